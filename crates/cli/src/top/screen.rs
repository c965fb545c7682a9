//! Answers for how `top` looks: one row for each disk, the same on a terminal and as text.

use std::cmp::Ordering;
use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Row as Cells, Table};

use super::sample::Row;
use crate::args::SortChoice;
use crate::list;

/// Headings, and how wide their columns are; the first takes what is left.
const COLUMNS: [(&str, u16); 12] = [
    ("NAME", 12),
    ("STATE", 8),
    ("R/s", 8),
    ("W/s", 8),
    ("RMB/s", 8),
    ("WMB/s", 8),
    ("QUEUE", 5),
    ("WAIT", 8),
    ("P50", 8),
    ("P99", 8),
    ("ERR", 6),
    ("DEVICE", 12),
];
const KEYS: &str = "q quit  s sort  r reverse  +/- slower, faster  up/down scroll";

impl SortChoice {
    const ALL: [SortChoice; 6] = [
        SortChoice::Name,
        SortChoice::Iops,
        SortChoice::Throughput,
        SortChoice::Queue,
        SortChoice::Wait,
        SortChoice::Errors,
    ];

    fn step(self, by: usize) -> SortChoice {
        let place = SortChoice::ALL.iter().position(|one| *one == self).unwrap_or(0);
        SortChoice::ALL[(place + by) % SortChoice::ALL.len()]
    }

    /// The one after it.
    pub fn next(self) -> SortChoice {
        self.step(1)
    }

    /// The one before it.
    pub fn previous(self) -> SortChoice {
        self.step(SortChoice::ALL.len() - 1)
    }

    fn name(self) -> &'static str {
        ["name", "IOPS", "throughput", "queue", "wait", "errors"]
            [SortChoice::ALL.iter().position(|one| *one == self).unwrap_or(0)]
    }

    /// The busiest first, names from A on.
    fn compare(self, a: &Row, b: &Row) -> Ordering {
        let most = |of: fn(&Row) -> f64| of(b).total_cmp(&of(a));
        #[allow(clippy::cast_precision_loss)] // To compare.
        let order = match self {
            SortChoice::Name => Ordering::Equal,
            SortChoice::Iops => most(|row| row.reads + row.writes),
            SortChoice::Throughput => most(|row| row.read_bytes + row.written_bytes),
            SortChoice::Queue => most(|row| row.queue as f64),
            SortChoice::Wait => most(|row| row.wait_ms.unwrap_or(-1.0)),
            SortChoice::Errors => most(|row| row.errors as f64),
        };
        order.then_with(|| a.name.cmp(&b.name))
    }
}

/// What is on the screen.
pub struct View {
    /// The disks.
    pub rows: Vec<Row>,
    /// In this order,
    pub sort: SortChoice,
    /// or the other way round.
    pub reversed: bool,
    /// The first one shown.
    pub first: usize,
    /// How long an interval is.
    pub every: Duration,
}

impl View {
    /// Nothing yet.
    pub fn new(sort: SortChoice, every: Duration) -> View {
        View { rows: Vec::new(), sort, reversed: false, first: 0, every }
    }

    /// Puts the rows in order.
    pub fn order(&mut self) {
        let (sort, reversed) = (self.sort, self.reversed);
        self.rows.sort_by(|a, b| {
            let order = sort.compare(a, b);
            if reversed { order.reverse() } else { order }
        });
        self.first = self.first.min(self.rows.len().saturating_sub(1));
    }

    /// Draws all of it.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let [top, middle, bottom] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(2), Constraint::Length(1)])
                .areas(frame.area());
        let direction = if self.reversed { ", reversed" } else { "" };
        let title = format!(
            "devsplice: {} disks, every {} s, by {}{direction}",
            self.rows.len(),
            self.every.as_secs_f64(),
            self.sort.name(),
        );
        frame.render_widget(Line::from(title), top);
        let widths = COLUMNS.iter().enumerate().map(|(place, (_, width))| match place {
            0 => Constraint::Min(*width),
            _ => Constraint::Length(*width),
        });
        let heads = Cells::new(COLUMNS.map(|(name, _)| Cell::from(name)));
        let head = heads.style(Style::new().add_modifier(Modifier::REVERSED));
        let rows = self.rows.iter().skip(self.first).map(|row| {
            let style = match (row.state.as_str(), row.errors) {
                ("live", 0) => Style::new(),
                ("live", _) => Style::new().fg(Color::Yellow),
                _ => Style::new().fg(Color::Red),
            };
            Cells::new(cells(row).map(Cell::from)).style(style)
        });
        frame.render_widget(Table::new(rows, widths).header(head), middle);
        frame.render_widget(Line::from(KEYS), bottom);
    }
}

/// A row as text, in the order of the columns.
fn cells(row: &Row) -> [String; 12] {
    let rate = |rate: f64| if rate < 99.95 { format!("{rate:.1}") } else { format!("{rate:.0}") };
    let time = |ns: Option<f64>| match ns {
        None => "-".to_owned(),
        Some(ns) if ns < 99_950.0 => format!("{:.1}us", ns / 1e3),
        Some(ns) if ns < 99_950_000.0 => format!("{:.1}ms", ns / 1e6),
        Some(ns) => format!("{:.1}s", ns / 1e9),
    };
    #[allow(clippy::cast_precision_loss)] // For people.
    let whole = |ns: Option<u64>| time(ns.map(|ns| ns as f64));
    [
        row.name.clone(),
        row.state.clone(),
        rate(row.reads),
        rate(row.writes),
        rate(row.read_bytes / 1e6),
        rate(row.written_bytes / 1e6),
        row.queue.to_string(),
        time(row.wait_ms.map(|ms| ms * 1e6)),
        whole(row.p50_ns),
        whole(row.p99_ns),
        row.errors.to_string(),
        row.device.clone(),
    ]
}

/// All rows as text.
pub fn table(rows: &[Row]) -> String {
    let mut all = vec![COLUMNS.map(|(name, _)| name.to_owned())];
    all.extend(rows.iter().map(cells));
    list::table(&all).into_iter().map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn row(name: &str, reads: f64, queue: u64, errors: u64) -> Row {
        let (state, device) = ("live".to_owned(), "/dev/ublkb0".to_owned());
        let (read_bytes, wait_ms) = (reads * 4096.0, Some(0.5));
        let (p50_ns, p99_ns) = (Some(1500), Some(200_000_000));
        let name = name.to_owned();
        Row {
            name,
            state,
            device,
            reads,
            read_bytes,
            queue,
            wait_ms,
            p50_ns,
            p99_ns,
            errors,
            ..Row::default()
        }
    }

    fn view(sort: SortChoice) -> View {
        let rows = vec![row("b", 10.0, 1, 0), row("c", 2000.0, 0, 3), row("a", 10.0, 9, 0)];
        let mut view = View { rows, ..View::new(sort, Duration::from_secs(2)) };
        view.order();
        view
    }

    fn drawn(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y).trim_end().to_owned()).collect()
    }

    #[test]
    fn each_disk_has_a_row_under_the_headings() {
        let lines = drawn(&view(SortChoice::Iops), 120, 8);
        assert_eq!(lines[0], "devsplice: 3 disks, every 2 s, by IOPS");
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&lines[1]), COLUMNS.map(|(name, _)| name));
        let busy = ["c", "live", "2000", "0.0", "8.2", "0.0", "0", "0.5ms", "1.5us", "0.2s", "3"];
        assert_eq!(words(&lines[2])[..11], busy);
        assert_eq!(words(&lines[3])[0], "a");
        assert_eq!(lines[7], KEYS);
        // A small terminal shows less, and is no reason to end.
        assert_eq!(drawn(&view(SortChoice::Name), 10, 2).len(), 2);
    }

    #[test]
    fn scrolling_leaves_out_the_first_and_never_all() {
        let mut view = view(SortChoice::Name);
        view.first = 99;
        view.order();
        let lines = drawn(&view, 120, 8);
        assert!(lines[2].starts_with('c') && lines[3].is_empty(), "{lines:?}");
    }

    #[test]
    fn orders_put_the_busiest_first_and_can_be_turned_round() {
        let names = |sort, reversed| {
            let mut view = View { reversed, ..view(sort) };
            view.order();
            view.rows.iter().map(|row| row.name.clone()).collect::<String>()
        };
        for (sort, want) in [
            (SortChoice::Name, "abc"),
            (SortChoice::Iops, "cab"),
            (SortChoice::Throughput, "cab"),
            (SortChoice::Queue, "abc"),
            (SortChoice::Wait, "abc"),
            (SortChoice::Errors, "cab"),
        ] {
            assert_eq!(names(sort, false), want, "{sort:?}");
            assert_eq!(names(sort, true), want.chars().rev().collect::<String>(), "{sort:?}");
        }
        let mut all = vec![SortChoice::Name];
        all.extend((0..5).scan(SortChoice::Name, |sort, _| {
            *sort = sort.next();
            Some(*sort)
        }));
        assert_eq!(all, SortChoice::ALL);
        assert_eq!(SortChoice::Name.previous(), SortChoice::Errors);
    }

    #[test]
    fn the_text_has_the_same_columns() {
        let text = table(&view(SortChoice::Queue).rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[0].starts_with("NAME") && lines[0].ends_with("DEVICE"));
        assert!(lines[1].starts_with('a') && lines[1].contains(" 9 "), "{text}");
        let none = Row { wait_ms: None, p50_ns: None, ..row("x", 0.0, 0, 0) };
        assert_eq!([&cells(&none)[7], &cells(&none)[8]], ["-", "-"]);
    }
}
