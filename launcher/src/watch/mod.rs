//! `repa-dist watch`: a run at a terminal, from what it leaves in its folder. Nothing is asked of the run itself, so that
//! it can be watched from any host that sees the folder, and after its end.

mod draw;
mod view;

use std::path::Path;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

pub use view::View;

use crate::exit::Failure;

/// Watches until the person has seen enough.
///
/// # Errors
/// The terminal cannot be used, or the run's log cannot be read.
pub fn watch(run: &Path, period: Duration) -> Result<(), Failure> {
    let mut view = View::new(run);
    view.look()?;
    // A panic gives the terminal back, too.
    let mut terminal = ratatui::try_init()
        .map_err(|e| Failure::usage(format!("cannot draw on this terminal: {e}; try --once")))?;
    let result = turn(&mut view, &mut terminal, period);
    ratatui::restore();
    result
}

fn turn(view: &mut View, terminal: &mut ratatui::DefaultTerminal, period: Duration) -> Result<(), Failure> {
    let io = |error| Failure::runtime(format!("the terminal has gone: {error}"));
    loop {
        terminal.draw(|frame| draw::draw(frame, view)).map_err(io)?;
        let next = Instant::now() + period;
        loop {
            if !event::poll(next.saturating_duration_since(Instant::now())).map_err(io)? {
                view.look()?;
                break;
            }
            match event::read().map_err(io)? {
                Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Char('w') => view.next_window(),
                    KeyCode::Char('s') => view.sorted = !view.sorted,
                    _ => continue,
                },
                Event::Resize(..) => {}
                _ => continue,
            }
            terminal.draw(|frame| draw::draw(frame, view)).map_err(io)?;
        }
    }
}

/// The same picture as text, `width` columns wide, for those that are no terminal.
///
/// # Errors
/// The run's log cannot be read.
pub fn once(run: &Path, width: u16) -> Result<String, Failure> {
    let mut view = View::new(run);
    view.look()?;
    let backend = ratatui::backend::TestBackend::new(width.max(40), draw::HEIGHT);
    let mut terminal = ratatui::Terminal::new(backend).map_err(Failure::runtime)?;
    terminal.draw(|frame| draw::draw(frame, &view)).map_err(Failure::runtime)?;
    let buffer = terminal.backend().buffer();
    let line = |y: u16| -> String { (0..buffer.area.width).map(|x| buffer[(x, y)].symbol()).collect() };
    let text: Vec<String> = (0..buffer.area.height).map(|y| line(y).trim_end().to_owned()).collect();
    Ok(text.join("\n").trim_end().to_owned() + "\n")
}
