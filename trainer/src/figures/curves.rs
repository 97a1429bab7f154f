//! Loss curves.

use image::RgbImage;
use image::imageops::{self, FilterType};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::text::{INK, failed, font};
use super::{FigureError, text};
use crate::images::Image;

/// Size of the picture in pixels.
const SIZE: (u32, u32) = (1200, 700);

/// Everything is drawn this many times larger and reduced: the library draws on whole pixels.
const SCALE: u32 = 3;

/// More points than this are thinned: a panel has fewer pixels.
const MOST_POINTS: usize = 1200;

const QUIET: RGBColor = RGBColor(72, 79, 92);
const AXIS: RGBColor = RGBColor(150, 157, 168);
const GRID: RGBColor = RGBColor(232, 235, 239);

/// Colour of the mean and of the raw values, panel by panel.
const COLOURS: [(RGBColor, RGBColor); 4] = [
    (RGBColor(29, 91, 214), RGBColor(190, 210, 247)),
    (RGBColor(208, 74, 20), RGBColor(249, 208, 184)),
    (RGBColor(36, 128, 61), RGBColor(190, 226, 200)),
    (RGBColor(110, 64, 201), RGBColor(216, 204, 246)),
];

/// Values over the steps of a run.
#[derive(Debug, Clone, Copy)]
pub struct Series<'a> {
    /// What they are, or whose.
    pub name: &'a str,
    /// (step, value), by ascending step. Values that are not finite are left out.
    pub points: &'a [(u64, f64)],
}

/// One plot: a quantity of one run, or of several.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// What is plotted.
    pub name: &'a str,
    /// One a run.
    pub series: &'a [Series<'a>],
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// A picture of 1200 x 700 pixels with the panels side by side. A panel of one series shows the value of each step in a
/// pale colour and, from 50 steps on, its mean over a window of a 25th of them in a strong one; a panel of several shows
/// their means, each in a colour of its own.
///
/// # Errors
/// [`FigureError::Draw`] where the drawing library fails.
pub fn loss_curves(title: &str, panels: &[Panel]) -> Result<Image, FigureError> {
    let (width, height) = (SIZE.0 * SCALE, SIZE.1 * SCALE);
    let mut buffer = vec![0; (width * height * 3) as usize];
    {
        let root = BitMapBackend::with_buffer(&mut buffer, (width, height)).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let (header, body) = root.split_vertically(px(62));
        write(&header, title, (28, 38), 28.0, &INK, HPos::Left)?;
        let body = body.margin(0, px(16), px(8), px(8));
        let areas = body.split_evenly((1, panels.len().max(1)));
        for (number, (area, panel)) in areas.iter().zip(panels).enumerate() {
            draw_panel(area, panel, COLOURS[number % COLOURS.len()])?;
        }
        root.present().map_err(failed)?;
    }
    let large = RgbImage::from_raw(width, height, buffer).expect("the buffer has the picture's size");
    let small = imageops::resize(&large, SIZE.0, SIZE.1, FilterType::Triangle);
    Ok(Image { width: SIZE.0 as usize, height: SIZE.1 as usize, pixels: small.into_raw() })
}

/// Pixels of the finished picture as pixels of the drawing.
fn px(pixels: u32) -> u32 {
    pixels * SCALE
}

fn write(
    area: &Area,
    line: &str,
    (x, y): (i32, i32),
    size: f64,
    colour: &RGBColor,
    side: HPos,
) -> Result<(), FigureError> {
    let style = font(size * f64::from(SCALE))?.color(colour).pos(Pos::new(side, VPos::Center));
    let at = (x * SCALE as i32, y * SCALE as i32);
    area.draw(&Text::new(line.to_owned(), at, style)).map_err(failed)
}

/// A series ready to be drawn.
struct Curve<'a> {
    name: &'a str,
    raw: Vec<(f64, f64)>,
    /// Over this many steps each; empty where there are too few.
    mean: Vec<(f64, f64)>,
    window: usize,
}

impl<'a> Curve<'a> {
    fn new(series: &Series<'a>) -> Self {
        let raw: Vec<(f64, f64)> = series
            .points
            .iter()
            .filter(|(_, value)| value.is_finite())
            .map(|&(step, value)| (step as f64, value))
            .collect();
        let window = (raw.len() / 25) | 1;
        let mean = if window > 1 { moving_mean(&raw, window) } else { Vec::new() };
        Self { name: series.name, raw, mean, window }
    }

    /// What stands for the series where there is room for one line.
    fn smooth(&self) -> &[(f64, f64)] {
        if self.mean.is_empty() { &self.raw } else { &self.mean }
    }
}

/// The steps that an axis has to show.
fn step_range(curves: &[Curve]) -> (f64, f64) {
    let first = curves.iter().filter_map(|c| c.raw.first()).map(|p| p.0).min_by(f64::total_cmp);
    let last = curves.iter().filter_map(|c| c.raw.last()).map(|p| p.0).max_by(f64::total_cmp);
    match (first, last) {
        // From 0 where that costs no room.
        (Some(first), Some(last)) if first <= 0.05 * last => (0.0, last),
        (Some(first), Some(last)) if last > first => (first, last),
        (Some(only), _) => (only, only + 1.0),
        _ => (0.0, 1.0),
    }
}

fn draw_panel(panel: &Area, what: &Panel, (strong, pale): (RGBColor, RGBColor)) -> Result<(), FigureError> {
    let curves: Vec<Curve> = what.series.iter().map(Curve::new).collect();
    let alone = curves.len() == 1;
    let all: Vec<(f64, f64)> =
        curves.iter().flat_map(|c| if alone { &c.raw } else { c.smooth() }).copied().collect();
    let (low, high) = value_range(&all);
    let (first, last) = step_range(&curves);
    let decimals = tick_decimals(high - low);
    let colour = |number: usize| if alone { strong } else { COLOURS[number % COLOURS.len()].0 };

    let (header, plot) = panel.split_vertically(px(64));
    let right = (header.dim_in_pixel().0 / SCALE) as i32 - 14;
    write(&header, what.name, (20, 18), 20.0, &INK, HPos::Left)?;
    match &curves[..] {
        [curve] => {
            if let Some(end) = curve.smooth().last() {
                let latest = format!("{} at step {}", value_text(end.1, decimals + 2), whole(last));
                write(&header, &latest, (right, 18), 17.0, &strong, HPos::Right)?;
            }
            let mean = format!("mean over {} steps", curve.window);
            match curve.mean.is_empty() {
                true => legend(&header, right, &[("each step", strong)])?,
                false => legend(&header, right, &[("each step", pale), (&mean, strong)])?,
            }
        }
        _ => {
            let text = |c: &Curve| match c.smooth().last() {
                Some(end) => format!("{} {}", c.name, value_text(end.1, decimals + 2)),
                None => c.name.to_owned(),
            };
            let names: Vec<String> = curves.iter().map(text).collect();
            let entries: Vec<(&str, RGBColor)> =
                names.iter().enumerate().map(|(number, name)| (name.as_str(), colour(number))).collect();
            legend(&header, right, &entries)?;
        }
    }

    let mut chart = ChartBuilder::on(&plot)
        .margin_right(px(14))
        .margin_top(px(6))
        .x_label_area_size(px(52))
        .y_label_area_size(px(62))
        .build_cartesian_2d(first..last, low..high)
        .map_err(failed)?;
    let labels = font(15.0 * f64::from(SCALE))?.color(&QUIET);
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(SCALE))
        .axis_style(AXIS.stroke_width(SCALE))
        .set_all_tick_mark_size(px(5))
        .y_label_offset(px(3))
        .x_labels(6)
        .y_labels(8)
        .x_label_formatter(&|step| whole(*step))
        .y_label_formatter(&|value| value_text(*value, decimals))
        .label_style(labels.clone())
        .axis_desc_style(labels)
        .x_desc("step")
        .draw()
        .map_err(failed)?;
    let clamped = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        thinned(points).into_iter().map(|(x, y)| (x, y.clamp(low, high))).collect()
    };
    let mut lines = Vec::new();
    for (number, curve) in curves.iter().enumerate() {
        if alone && !curve.mean.is_empty() {
            lines.push((clamped(&curve.raw), pale.stroke_width(SCALE)));
        }
        let width = if curve.mean.is_empty() { 2 * SCALE } else { 2 * SCALE + 1 };
        lines.push((clamped(curve.smooth()), colour(number).stroke_width(width)));
    }
    for (line, style) in lines {
        // Pieces, with round joints: the library's own polylines overlap themselves on sharp turns.
        let pieces = line.windows(2).map(|ends| PathElement::new(ends.to_vec(), style));
        chart.draw_series(pieces).map_err(failed)?;
        let joint = (style.stroke_width / 2) as i32;
        let joints = line.iter().map(|&at| Circle::new(at, joint, style.color.filled()));
        chart.draw_series(joints).map_err(failed)?;
    }
    Ok(())
}

/// Short strokes with their meaning, ending at `right`.
fn legend(header: &Area, right: i32, entries: &[(&str, RGBColor)]) -> Result<(), FigureError> {
    const STROKE: i32 = 26;
    let y = 46;
    let mut x = right;
    for (name, colour) in entries.iter().rev() {
        write(header, name, (x, y), 15.0, &QUIET, HPos::Right)?;
        x -= text::width(name, 15.0)? as i32 + 8;
        let ends = [x - STROKE, x].map(|x| (x * SCALE as i32, (y - 3) * SCALE as i32));
        let style = colour.stroke_width(3 * SCALE);
        header.draw(&PathElement::new(ends.to_vec(), style)).map_err(failed)?;
        x -= STROKE + 22;
    }
    Ok(())
}

/// Mean over `window` (odd) points around each. The first points, where losses fall steeply, have as
/// many on their left as on their right; the last ones have fewer on their right.
fn moving_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let half = window / 2;
    let mean = |part: &[(f64, f64)]| part.iter().map(|(_, value)| value).sum::<f64>() / part.len() as f64;
    (0..points.len())
        .map(|i| {
            let reach = half.min(i);
            (points[i].0, mean(&points[i - reach..points.len().min(i + reach + 1)]))
        })
        .collect()
}

/// Where most values lie, with some room: a spike or two must not flatten the curve.
fn value_range(points: &[(f64, f64)]) -> (f64, f64) {
    let mut values: Vec<f64> = points.iter().map(|(_, value)| *value).collect();
    values.sort_unstable_by(f64::total_cmp);
    let (Some(&least), Some(&most)) = (values.first(), values.last()) else {
        return (0.0, 1.0);
    };
    let cut = values.len() / 200;
    let (low, high) = (values[cut], values[values.len() - 1 - cut]);
    let (low, high) = if low < high { (low, high) } else { (least, most) };
    let room = if low < high { 0.06 * (high - low) } else { low.abs().max(1.0) * 0.1 };
    (low - room, high + room)
}

/// At most [`MOST_POINTS`] points; of each group the least and the greatest, so that no spike is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let group = points.len().div_ceil(MOST_POINTS / 2);
    points
        .chunks(group)
        .flat_map(|group| {
            let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
            let least = group.iter().min_by(by_value).copied();
            let most = group.iter().max_by(by_value).copied();
            let mut ends: Vec<(f64, f64)> = least.into_iter().chain(most).collect();
            ends.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
            ends
        })
        .collect()
}

/// Decimals of the ticks of an axis of this span, of which there are about eight.
fn tick_decimals(span: f64) -> usize {
    (-(span / 8.0).log10()).ceil().clamp(0.0, 8.0) as usize
}

fn value_text(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    // No sign before a zero.
    if text.trim_start_matches('-').bytes().all(|b| matches!(b, b'0' | b'.')) {
        text.trim_start_matches('-').to_owned()
    } else {
        text
    }
}

/// A number without its fraction, and its thousands apart.
pub fn whole(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decay(steps: u64) -> Vec<(u64, f64)> {
        (1..=steps).map(|s| (s, 0.5 + (-(s as f64) / 50.0).exp() + 0.05 * ((s * 7919 % 13) as f64))).collect()
    }

    /// Pixels of about a colour: thin lines are blended with the white around them.
    fn pixels_of(image: &Image, RGBColor(r, g, b): RGBColor) -> usize {
        let near = |p: &[u8]| p.iter().zip([r, g, b]).all(|(&a, b)| a.abs_diff(b) <= 8);
        image.pixels.chunks_exact(3).filter(|p| near(p)).count()
    }

    #[test]
    fn each_series_is_drawn_in_its_colours() {
        let points = decay(400);
        let one = Series { name: "a run", points: &points };
        let two = Series { name: "a run", points: &points[..30] };
        let panels = [
            Panel { name: "denoising loss", series: &[one] },
            Panel { name: "alignment loss", series: &[two] },
        ];
        let image = loss_curves("Losses", &panels).expect("a picture");
        assert_eq!((image.width, image.height), (1200, 700));
        assert!(pixels_of(&image, COLOURS[0].0) > 300, "a mean");
        assert!(pixels_of(&image, COLOURS[0].1) > 300, "raw values");
        assert!(pixels_of(&image, COLOURS[1].0) > 100, "few values are drawn strong");
        let (with_mean, without) = (pixels_of(&image, COLOURS[0].1), pixels_of(&image, COLOURS[1].1));
        assert!(without < with_mean / 4, "and have no mean: {without} pale pixels of {with_mean}");
    }

    #[test]
    fn several_runs_share_a_panel_in_colours_of_their_own() {
        let (long, short) = (decay(400), decay(200));
        let higher: Vec<(u64, f64)> = long.iter().map(|&(step, value)| (step, value + 0.7)).collect();
        let runs = [&long, &higher, &short].map(|points| Series { name: "run", points });
        let image = loss_curves("", &[Panel { name: "loss", series: &runs }]).expect("a picture");
        for (strong, pale) in COLOURS[..3].iter().map(|&(a, b)| (pixels_of(&image, a), pixels_of(&image, b)))
        {
            // The edges of a line blend into a pale colour, too.
            assert!(strong > 300 && pale < strong / 2, "{strong} strong pixels, {pale} pale ones");
        }
        assert_eq!(pixels_of(&image, COLOURS[3].0), 0);
    }

    #[test]
    fn odd_series_are_drawn_too() {
        let spike: Vec<(u64, f64)> = vec![(1, f64::NAN), (2, 3.0), (3, f64::INFINITY)];
        let flat: Vec<(u64, f64)> = (0..100).map(|s| (s, 2.0)).collect();
        for points in [&[][..], &spike, &flat] {
            let series = Series { name: "x", points };
            loss_curves("", &[Panel { name: "x", series: &[series] }]).expect("a picture");
            loss_curves("", &[Panel { name: "x", series: &[series, series] }]).expect("a picture");
        }
        loss_curves("no series", &[Panel { name: "x", series: &[] }]).expect("a picture");
        loss_curves("nothing", &[]).expect("a picture");
    }

    #[test]
    fn a_spike_does_not_set_the_range() {
        let mut points: Vec<(f64, f64)> = (0..1000).map(|i| (f64::from(i), f64::from(i % 10))).collect();
        points[500].1 = 1e9;
        let (low, high) = value_range(&points);
        assert!(low < 0.0 && low > -1.0 && high > 9.0 && high < 10.0, "{low} {high}");
    }

    #[test]
    fn the_mean_keeps_a_slope_and_thinning_the_extremes() {
        let line: Vec<(f64, f64)> = (0..5000).map(|i| (f64::from(i), 2.0 * f64::from(i))).collect();
        let mean = moving_mean(&line, 201);
        let early = mean.iter().zip(&line).take(4900);
        assert!(early.into_iter().all(|(a, b)| (a.1 - b.1).abs() < 1e-6));
        assert!((mean[4999].1 - 2.0 * 4949.0).abs() < 1e-6, "the last hundred and one");
        let mut spiked = line.clone();
        spiked[1234].1 = -7.0;
        let thin = thinned(&spiked);
        assert!(thin.len() <= MOST_POINTS && thin.contains(&(1234.0, -7.0)));
        assert!(thin.windows(2).all(|w| w[0].0 <= w[1].0));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!([0.0, 999.0, 1000.0, 1234567.0].map(whole), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.1, 0.8, 1.6, 500.0].map(tick_decimals), [2, 1, 1, 0]);
        assert_eq!([-0.8125, -1e-9].map(|x| value_text(x, 2)), ["-0.81", "0.00"]);
    }
}
