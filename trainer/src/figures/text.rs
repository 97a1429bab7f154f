//! Text in figures, in the font that comes with the binary (Ubuntu Light), so that every machine draws
//! the same.

use std::sync::OnceLock;

use image::{Rgb, RgbImage};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontDesc, FontFamily, FontStyle, register_font};

use super::FigureError;

/// Dark text.
pub(super) const INK: RGBColor = RGBColor(31, 36, 48);

const FAMILY: &str = "repa-figures";

/// Text is drawn this many times larger and reduced: the library places glyphs at whole pixels.
const OVERSAMPLING: usize = 4;

/// Any drawing error, for `map_err`.
pub(super) fn failed(error: impl std::fmt::Display) -> FigureError {
    FigureError::Draw(error.to_string())
}

/// The figures' font; `size` in pixels.
pub(super) fn font(size: f64) -> Result<FontDesc<'static>, FigureError> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = REGISTERED
        .get_or_init(|| register_font(FAMILY, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT).is_ok());
    if *registered {
        Ok(FontDesc::new(FontFamily::Name(FAMILY), size, FontStyle::Normal))
    } else {
        Err(FigureError::Draw("the built-in font is damaged".to_owned()))
    }
}

/// Width of a line of text, in pixels.
pub(super) fn width(text: &str, size: f64) -> Result<usize, FigureError> {
    let (width, _) = font(size * OVERSAMPLING as f64)?.box_size(text).map_err(failed)?;
    Ok((width as usize).div_ceil(OVERSAMPLING))
}

/// Draws a line of text whose box begins at `x` and whose middle is at `y`. What lies outside of the
/// canvas is cut off.
pub(super) fn draw(
    canvas: &mut RgbImage,
    text: &str,
    x: usize,
    y: usize,
    size: f64,
) -> Result<(), FigureError> {
    let height = (size * 1.6).ceil() as usize;
    let (columns, rows) = (width(text, size)? + 4, height);
    let (wide, high) = ((columns * OVERSAMPLING) as u32, (rows * OVERSAMPLING) as u32);
    let mut mask = vec![0; (wide * high * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut mask, (wide, high)).into_drawing_area();
        let style = font(size * OVERSAMPLING as f64)?.color(&WHITE).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(text, (0, high as i32 / 2), style)).map_err(failed)?;
        area.present().map_err(failed)?;
    }
    let cell = OVERSAMPLING;
    for row in 0..rows {
        for column in 0..columns {
            let mut covered = 0;
            for (dy, dx) in (0..cell).flat_map(|dy| (0..cell).map(move |dx| (dy, dx))) {
                let at = (row * cell + dy) * wide as usize + column * cell + dx;
                covered += u32::from(mask[at * 3]);
            }
            let (to_x, to_y) = (x + column, (y + row).checked_sub(height / 2));
            let Some(pixel) = to_y.and_then(|to_y| canvas.get_pixel_mut_checked(to_x as u32, to_y as u32))
            else {
                continue;
            };
            blend(pixel, covered, 255 * (cell * cell) as u32);
        }
    }
    Ok(())
}

/// Mixes ink into a pixel: `covered` of `whole`.
fn blend(pixel: &mut Rgb<u8>, covered: u32, whole: u32) {
    for (channel, ink) in pixel.0.iter_mut().zip([INK.0, INK.1, INK.2]) {
        let mixed = u32::from(*channel) * (whole - covered) + u32::from(ink) * covered;
        *channel = (mixed / whole) as u8;
    }
}
