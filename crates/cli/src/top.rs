//! Answers for `devsplice top`: what all disks here are doing, again and again, on a terminal or as
//! lines for scripts.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use devsplice_core::{Error, Result};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde_json::Value;

use crate::args::Top;
use crate::metrics;

mod sample;
mod screen;

use sample::{Row, Sample};
use screen::View;

/// Shows them until told to stop.
///
/// # Errors
/// If the state cannot be read, or the terminal not be used.
pub fn run(top: &Top) -> Result<()> {
    let every = Duration::from_secs_f64(top.delay.clamp(0.1, 3600.0));
    let is_batch = top.once || top.json || top.batch || !std::io::stdout().is_terminal();
    if is_batch {
        return lines(top, every);
    }
    let mut terminal = ratatui::try_init().map_err(|error| Error::os("terminal", &error))?;
    let done = live(&mut terminal, top, every);
    ratatui::restore();
    done
}

/// Prints a table, or a line of JSON, for each interval.
fn lines(top: &Top, every: Duration) -> Result<()> {
    let rounds = if top.once { Some(1) } else { top.count };
    let mut view = View::new(top.sort, every);
    let mut last = Sample::take(metrics::disks()?);
    let mut round = 0;
    while rounds.is_none_or(|most| round < most) {
        std::thread::sleep(every);
        let next = Sample::take(metrics::disks()?);
        view.rows = next.since(&last);
        view.order();
        last = next;
        round += 1;
        let text = if top.json { json(&view.rows) } else { screen::table(&view.rows) };
        let gone = std::io::stdout().write_all(text.as_bytes()).is_err();
        // A reader that has gone wants no more.
        if gone {
            break;
        }
    }
    Ok(())
}

fn json(rows: &[Row]) -> String {
    format!("{}\n", Value::Array(rows.iter().map(Row::json).collect()))
}

/// Draws until a key ends it.
fn live(terminal: &mut DefaultTerminal, top: &Top, every: Duration) -> Result<()> {
    let os = |error| Error::os("terminal", &error);
    let mut view = View::new(top.sort, every);
    let mut last = Sample::take(metrics::disks()?);
    let mut round = 0;
    loop {
        let end = Instant::now() + view.every;
        terminal.draw(|frame| view.draw(frame)).map_err(os)?;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if !event::poll(left).map_err(os)? {
                break;
            }
            if let Event::Key(key) = event::read().map_err(os)?
                && key.kind != KeyEventKind::Release
                && !press(&mut view, key)
            {
                return Ok(());
            }
            terminal.draw(|frame| view.draw(frame)).map_err(os)?;
        }
        let next = Sample::take(metrics::disks()?);
        view.rows = next.since(&last);
        view.order();
        last = next;
        round += 1;
        if top.count.is_some_and(|most| round >= most) {
            return Ok(());
        }
    }
}

/// Does what a key asks for; whether to go on.
fn press(view: &mut View, key: KeyEvent) -> bool {
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Char('s') | KeyCode::Right => view.sort = view.sort.next(),
        KeyCode::Left => view.sort = view.sort.previous(),
        KeyCode::Char('r') => view.reversed = !view.reversed,
        KeyCode::Char('+') => view.every = (view.every * 2).min(Duration::from_secs(60)),
        KeyCode::Char('-') => view.every = (view.every / 2).max(Duration::from_millis(250)),
        KeyCode::Down => view.first = (view.first + 1).min(view.rows.len().saturating_sub(1)),
        KeyCode::Up => view.first = view.first.saturating_sub(1),
        _ => {}
    }
    view.order();
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::SortChoice;

    #[test]
    fn keys_sort_turn_round_slow_down_and_end() {
        let mut view = View::new(SortChoice::Name, Duration::from_secs(1));
        let mut press = |code| {
            let goes_on = super::press(&mut view, KeyEvent::new(code, KeyModifiers::NONE));
            (goes_on, view.sort, view.reversed, view.every.as_millis())
        };
        assert_eq!(press(KeyCode::Char('s')), (true, SortChoice::Iops, false, 1000));
        assert_eq!(press(KeyCode::Char('r')), (true, SortChoice::Iops, true, 1000));
        assert_eq!(press(KeyCode::Left), (true, SortChoice::Name, true, 1000));
        assert_eq!(press(KeyCode::Char('+')), (true, SortChoice::Name, true, 2000));
        assert!(press(KeyCode::Char('x')).0);
        assert!(!press(KeyCode::Esc).0 && !press(KeyCode::Char('q')).0);
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert!(!super::press(&mut view, control_c));
        for _ in 0..9 {
            super::press(&mut view, KeyEvent::new(KeyCode::Char('-'), KeyModifiers::NONE));
        }
        assert_eq!(view.every.as_millis(), 250);
    }
}
