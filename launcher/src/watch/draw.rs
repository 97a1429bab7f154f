//! Draws a [`View`].

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph};
use repa_trainer::telemetry::events::{Event, EventKind};
use repa_trainer::telemetry::progress::duration;
use repa_trainer::train::RankLine;

use super::view::{Point, View, mean};
use crate::run::Stand;

/// Lines that everything fits in.
pub const HEIGHT: u16 = 40;

/// A rank whose own work takes so many times the median's is told apart.
const SLOW: f64 = 1.3;

type Value = fn(&Point) -> f32;

const QUIET: Style = Style::new().fg(Color::DarkGray);

/// Draws everything.
pub fn draw(frame: &mut Frame, view: &View) {
    let ranks = view.status.as_ref().map_or(0, |status| status.ranks.len()) as u16;
    let height = frame.area().height;
    // Ranks and events give way to the curves on a small terminal.
    let rank_lines = (ranks + 2).min(height / 4).max(3);
    let event_lines = (view.events.len() as u16 + 2).clamp(3, (height / 5).max(3));
    let [head, gauge, curves, ranks, events, foot] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(1),
        Constraint::Min(8),
        Constraint::Length(rank_lines),
        Constraint::Length(event_lines),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    draw_head(frame, view, head);
    draw_gauge(frame, view, gauge);
    draw_curves(frame, view, curves);
    draw_ranks(frame, view, ranks);
    draw_events(frame, view, events);
    let keys = format!(" q quit · w curves of {} · s slowest ranks first", view.window());
    frame.render_widget(Paragraph::new(keys).style(QUIET), foot);
}

fn draw_head(frame: &mut Frame, view: &View, area: Rect) {
    let (word, colour) = match view.stand() {
        None => ("not begun", Color::DarkGray),
        Some(stand @ Stand::Training) => (stand.word(), Color::Green),
        Some(stand @ Stand::Complete) => (stand.word(), Color::Cyan),
        Some(stand @ Stand::Stopped) => (stand.word(), Color::Yellow),
        Some(stand @ Stand::Interrupted) => (stand.word(), Color::Red),
    };
    let recent = view.recent();
    let figure = |value: Option<f64>, what: &dyn Fn(f64) -> String| value.map_or_else(String::new, what);
    let share = |value: Value| -> Option<f64> { Some(mean(recent, value)? / mean(recent, |p| p.seconds)?) };
    let mut words = vec![
        Span::from(format!(" {} ", view.run.display())).bold(),
        Span::styled(format!("{word}  "), Style::new().fg(colour).add_modifier(Modifier::BOLD)),
        Span::from(figure(mean(recent, |p| p.images_per_second), &|x| format!("{x:.0} images/s  "))),
        Span::from(figure(mean(recent, |p| p.seconds), &|x| format!("{:.0} ms a step  ", 1000.0 * x))),
    ];
    if view.stand() == Some(Stand::Training) {
        words.push(Span::from(figure(view.time_left(), &|x| format!("{} left", duration(x)))));
    } else if let Some(status) = &view.status {
        words.push(Span::styled(format!("{} ago", duration((view.time - status.time).max(0.0))), QUIET));
    }
    let durable = view.status.as_ref().and_then(|status| status.durable);
    let skipped = view.points.iter().filter(|p| p.loss_is_skipped).count();
    let mut more = vec![
        Span::from(match durable {
            Some(step) => format!(" checkpoint of step {step}  "),
            None => " no checkpoint yet  ".into(),
        }),
        Span::from(figure(share(|p| p.data_wait), &|x| format!("data {:.1} %  ", 100.0 * x))),
        Span::from(figure(share(|p| p.communication), &|x| format!("communication {:.1} %  ", 100.0 * x))),
    ];
    if skipped > 0 {
        more.push(Span::styled(format!("{skipped} steps left out"), Style::new().fg(Color::Red)));
    }
    frame.render_widget(Paragraph::new(vec![Line::from(words), Line::from(more)]), area);
}

fn draw_gauge(frame: &mut Frame, view: &View, area: Rect) {
    let done = view.points.last().map_or(0, |p| p.step);
    let steps = view.status.as_ref().map_or(0, |status| status.steps);
    let ratio = if steps == 0 { 0.0 } else { (done as f64 / steps as f64).clamp(0.0, 1.0) };
    let label = if steps == 0 { format!("step {done}") } else { format!("step {done} of {steps}") };
    let style = Style::new().fg(Color::Blue).bg(Color::Black);
    frame.render_widget(Gauge::default().ratio(ratio).label(label).gauge_style(style), area);
}

fn draw_curves(frame: &mut Frame, view: &View, area: Rect) {
    let curves: [(&str, Value, Color); 4] = [
        ("denoising loss", |p| p.denoising, Color::Blue),
        ("alignment loss", |p| p.alignment, Color::LightRed),
        ("gradient norm", |p| p.grad_norm, Color::Magenta),
        ("images/s", |p| p.images_per_second, Color::Green),
    ];
    let rows = if area.height >= 16 { 2 } else { 1 };
    let columns = if area.width >= 60 { 2 } else { 1 };
    let mut cells = Vec::new();
    for row in Layout::vertical(vec![Constraint::Fill(1); rows]).split(area).iter() {
        cells.extend(Layout::horizontal(vec![Constraint::Fill(1); columns]).split(*row).iter().copied());
    }
    for (cell, (name, value, colour)) in cells.into_iter().zip(curves) {
        curve(frame, cell, view.shown(), name, value, colour);
    }
}

fn curve(frame: &mut Frame, area: Rect, points: &[Point], name: &str, value: Value, colour: Color) {
    // Two dots a column.
    let data = grouped(points, value, 2 * usize::from(area.width.max(1)));
    let (low, high) = range(&data);
    let latest = mean(&points[points.len().saturating_sub((points.len() / 50).max(1))..], value);
    let title = match latest {
        Some(latest) => format!(" {name} {} ", short(latest)),
        None => format!(" {name} "),
    };
    let steps = [points.first().map_or(0, |p| p.step) as f64, points.last().map_or(1, |p| p.step) as f64];
    let dataset = Dataset::default()
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(Style::new().fg(colour))
        .data(&data);
    let chart = Chart::new(vec![dataset])
        .block(Block::bordered().title(title).border_style(QUIET))
        .x_axis(
            Axis::default()
                .bounds([steps[0], steps[1].max(steps[0] + 1.0)])
                .labels(steps.map(|step| format!("{step:.0}")))
                .style(QUIET),
        )
        .y_axis(Axis::default().bounds([low, high]).labels([short(low), short(high)]).style(QUIET));
    frame.render_widget(chart, area);
}

/// At most `most` points, each the mean of as many steps.
fn grouped(points: &[Point], value: Value, most: usize) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(most).max(1);
    let point = |steps: &[Point]| Some((steps.last()?.step as f64, mean(steps, value)?));
    points.chunks(group).filter_map(point).collect()
}

/// What an axis has to show, with some room.
fn range(data: &[(f64, f64)]) -> (f64, f64) {
    let mut values: Vec<f64> = data.iter().map(|(_, y)| *y).collect();
    values.sort_unstable_by(f64::total_cmp);
    let (Some(&least), Some(&most)) = (values.first(), values.last()) else { return (0.0, 1.0) };
    // A spike must not flatten the rest.
    let high = values[values.len() - 1 - values.len() / 100];
    let (low, high) = if high > least { (least, high) } else { (least, most) };
    let room = if high > low { 0.05 * (high - low) } else { (0.1 * low.abs()).max(1e-6) };
    (low - room, high + room)
}

/// Three or four digits.
fn short(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        size if !(1e-3..1e5).contains(&size) => format!("{x:.1e}"),
        size if size >= 100.0 => format!("{x:.0}"),
        size if size >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.3}"),
    }
}

fn draw_ranks(frame: &mut Frame, view: &View, area: Rect) {
    let block = Block::bordered().title(" ranks: own work in a step ").border_style(QUIET);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let Some(status) = &view.status else { return };
    let mut ranks: Vec<&RankLine> = status.ranks.iter().collect();
    let work = |rank: &&RankLine| rank.step_seconds.unwrap_or(0.0);
    let slowest = ranks.iter().map(work).fold(0.0, f64::max);
    let mut times: Vec<f64> = ranks.iter().filter_map(|rank| rank.step_seconds).collect();
    times.sort_unstable_by(f64::total_cmp);
    let median = times.get(times.len().saturating_sub(1) / 2).copied().unwrap_or(0.0);
    let room = usize::from(inner.height);
    if view.sorted || ranks.len() > room {
        // Where not all can be shown, those that matter.
        ranks.sort_by(|a, b| work(b).total_cmp(&work(a)));
    }
    let hidden = ranks.len().saturating_sub(room);
    let width = usize::from(inner.width);
    let mut lines: Vec<Line> =
        ranks.iter().take(room).map(|rank| rank_line(rank, slowest, median, width)).collect();
    if let (true, Some(last)) = (hidden > 0, lines.last_mut()) {
        *last = Line::styled(format!("and {} more", hidden + 1), QUIET);
    }
    frame.render_widget(Paragraph::new(lines), inner);
}

fn rank_line(rank: &RankLine, slowest: f64, median: f64, width: usize) -> Line<'static> {
    let phase = match (&rank.phase, rank.state.as_str()) {
        (Some(phase), "running") => phase.clone(),
        _ => rank.state.clone(),
    };
    let step = rank.step.map_or_else(|| "-".into(), |step| step.to_string());
    let long = rank.in_phase_seconds.filter(|&s| s >= 5.0 && rank.state == "running");
    let long = long.map_or_else(String::new, |s| format!(" for {}", duration(s)));
    let left = format!("{:>5} {:<14.14} {step:>8}  ", rank.rank, rank.host);
    let time = rank.step_seconds.map_or_else(|| "      -  ".into(), |s| format!("{:>7.1} ms ", 1000.0 * s));
    let right = format!(" {phase}{long}");
    let room = width.saturating_sub(left.len() + time.len() + 28);
    let share = rank.step_seconds.map_or(0.0, |s| if slowest > 0.0 { s / slowest } else { 0.0 });
    let filled = (share * room as f64).round() as usize;
    let slow = rank.step_seconds.is_some_and(|s| s > SLOW * median && s > median + 0.01);
    let colour = match rank.state.as_str() {
        "running" if slow => Color::Yellow,
        "running" => Color::Blue,
        "ended" => Color::DarkGray,
        _ => Color::Red,
    };
    Line::from(vec![
        Span::from(left),
        Span::from(time),
        Span::styled("█".repeat(filled), Style::new().fg(colour)),
        Span::styled("·".repeat(room - filled), QUIET),
        Span::styled(right, Style::new().fg(if colour == Color::Blue { Color::Reset } else { colour })),
    ])
}

fn draw_events(frame: &mut Frame, view: &View, area: Rect) {
    let block = Block::bordered().title(" what happened ").border_style(QUIET);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let shown = view.events.len().saturating_sub(usize::from(inner.height));
    let lines: Vec<Line> = view.events[shown..].iter().map(|event| event_line(event, view.time)).collect();
    frame.render_widget(Paragraph::new(lines), inner);
}

fn event_line(event: &Event, now: f64) -> Line<'static> {
    let colour = match event.kind {
        EventKind::SaveFailed | EventKind::Skipped | EventKind::Other => Color::Red,
        EventKind::Straggler | EventKind::Stop => Color::Yellow,
        _ => Color::Reset,
    };
    let ago = format!("{:>14} ago  step {:<8} ", duration((now - event.time).max(0.0)), event.step);
    let text = event.text.lines().next().unwrap_or_default().to_owned();
    Line::from(vec![Span::styled(ago, QUIET), Span::styled(text, Style::new().fg(colour))])
}

#[cfg(test)]
mod tests;
