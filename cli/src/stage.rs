//! A part of the screen that shows a model at work: its text, and beside it which experts are in memory.
//!
//! The stage is drawn at the cursor, and again at the same place whenever something has changed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rustix::termios::tcgetwinsize;
use sluice_model::memory::Bytes;
use sluice_model::{Engine, Stats};

use crate::chat::screen::Kind;
use crate::error::CliError;
use crate::terminal::{print_as_is, text_for_terminal};

/// Lines of the stage.
const LINES: usize = 13;
/// Columns of the text, and of the part beside it.
const TEXT: usize = 42;
const SIDE: usize = 36;
/// The smallest terminal that has room for it, and for the program's output before and after.
const LEAST: (usize, usize) = (TEXT + SIDE + 2, 24);
/// The least time between two pictures, so that a fast model can be watched.
const PICTURE: Duration = Duration::from_millis(30);

/// The change of an expert since the last picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// On the drive.
    Drive,
    /// In memory, as before.
    Memory,
    /// It has been read.
    Came,
    /// It has left memory.
    Went,
}

impl Place {
    fn of(before: bool, now: bool) -> Place {
        match (before, now) {
            (false, false) => Place::Drive,
            (true, true) => Place::Memory,
            (false, true) => Place::Came,
            (true, false) => Place::Went,
        }
    }

    /// Its character and colour.
    fn look(self) -> (char, &'static str) {
        match self {
            Place::Drive => ('·', "2"),
            Place::Memory => ('▪', "36"),
            Place::Came => ('●', "1;32"),
            Place::Went => ('○', "31"),
        }
    }
}

/// The place where a model is watched.
#[derive(Debug)]
pub(crate) struct Stage {
    colours: bool,
    title: &'static str,
    text: String,
    /// For each layer with experts, the experts that were in memory in the last picture.
    before: BTreeMap<usize, Vec<bool>>,
    start: Stats,
    drawn: bool,
    last: Instant,
}

impl Stage {
    /// A stage, if standard output is a terminal with enough room.
    pub(crate) fn new() -> Option<Stage> {
        let Kind::Terminal { colours } = Kind::of_stdout() else { return None };
        let size = tcgetwinsize(std::io::stdout()).ok()?;
        let fits = usize::from(size.ws_col) >= LEAST.0 && usize::from(size.ws_row) >= LEAST.1;
        let (text, before, start) = (String::new(), BTreeMap::new(), Stats::default());
        fits.then(|| Stage { colours, title: "", text, before, start, drawn: false, last: Instant::now() })
    }

    /// Begins a scene: another model, or the same one again.
    pub(crate) fn begin(&mut self, title: &'static str, text: &str, engine: &Engine) {
        (self.title, self.text, self.start) = (title, text.to_owned(), engine.stats());
        self.before.clear();
    }

    /// Adds more of the model's text.
    pub(crate) fn say(&mut self, text: &str) {
        self.text += text;
    }

    /// Draws the present state of the stage, and pauses for a moment.
    ///
    /// # Errors
    /// If the terminal is gone.
    pub(crate) fn draw(&mut self, engine: &Engine) -> Result<(), CliError> {
        let side = self.side(engine);
        let text = wrapped(&text_for_terminal(&self.text), TEXT);
        let text = &text[text.len().saturating_sub(LINES)..];
        let mut picture = String::new();
        if std::mem::replace(&mut self.drawn, true) {
            picture += &format!("\x1b[{LINES}A\r");
        }
        for line in 0..LINES {
            let left = text.get(line).map_or("", String::as_str);
            let right = side.get(line).map_or("", String::as_str);
            let gap = " ".repeat(TEXT + 1 - left.chars().count());
            picture += &format!("\x1b[K{left}{gap}{right}\n");
        }
        print_as_is(&picture)?;
        let wait = PICTURE.saturating_sub(self.last.elapsed());
        std::thread::sleep(wait);
        self.last = Instant::now();
        Ok(())
    }

    /// The part beside the text: the map, and figures.
    fn side(&mut self, engine: &Engine) -> Vec<String> {
        let mut lines = vec![self.paint("1", self.title)];
        let residency = engine.residency();
        let (mut resident, mut all) = (0, 0);
        for layer in &residency {
            let before = self.before.insert(layer.layer, layer.resident.clone());
            // In the first picture, nothing has been read or has left.
            let before = before.unwrap_or_else(|| layer.resident.clone());
            (resident, all) = (resident + layer.count(), all + layer.experts);
            lines.push(format!("{:>2} {}", layer.layer, self.row(&before, &layer.resident)));
        }
        let legend = [Place::Memory, Place::Came, Place::Went, Place::Drive].map(|place| {
            let name = match place {
                Place::Memory => "memory",
                Place::Came => "came",
                Place::Went => "went",
                Place::Drive => "drive",
            };
            format!("{} {name}", self.paint(place.look().1, &place.look().0.to_string()))
        });
        lines.push(legend.join("  "));
        lines.extend(self.figures(&engine.stats(), resident, all));
        lines
    }

    fn row(&self, before: &[bool], now: &[bool]) -> String {
        let places: Vec<Place> = before.iter().zip(now).map(|(&before, &now)| Place::of(before, now)).collect();
        let run = |run: &[Place]| {
            let (character, style) = run[0].look();
            self.paint(style, &character.to_string().repeat(run.len()))
        };
        places.chunk_by(PartialEq::eq).map(run).collect()
    }

    fn figures(&self, now: &Stats, resident: usize, all: usize) -> Vec<String> {
        let start = &self.start;
        let (hits, misses) = (now.hits - start.hits, now.misses - start.misses);
        let bytes = now.expert_bytes_read - start.expert_bytes_read;
        let seconds = now.seconds - start.seconds;
        let found = (100 * hits).checked_div(hits + misses).unwrap_or(0);
        let rate = if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 };
        let tokens = (now.tokens - start.tokens) as f64 / if seconds > 0.0 { seconds } else { 1.0 };
        vec![
            String::new(),
            format!("in memory  {resident} of {all} experts"),
            format!("hits       {found} % of {} uses", hits + misses),
            format!("drive      {} read, {}/s", Bytes(bytes), Bytes(rate as u64)),
            format!("speed      {tokens:.0} tokens/s, shown slowly"),
        ]
    }

    fn paint(&self, style: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A text in lines of at most this many characters, cut between words if possible.
fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.split('\n') {
        let mut rest = line;
        while let Some((end, _)) = rest.char_indices().nth(columns) {
            let cut = rest[..end].rfind(' ').map_or(end, |space| space + 1);
            lines.push(rest[..cut].trim_end().to_owned());
            rest = &rest[cut..];
        }
        lines.push(rest.to_owned());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_between_words() {
        assert_eq!(wrapped("the cat sat on\n\nthe mat", 8), ["the cat", "sat on", "", "the mat"]);
        assert_eq!(wrapped("abcdefghij", 4), ["abcd", "efgh", "ij"]);
        assert_eq!(wrapped("ääää öö", 5), ["ääää", "öö"]);
    }

    #[test]
    fn experts_come_and_go() {
        let places = [(false, false), (true, true), (false, true), (true, false)].map(|(a, b)| Place::of(a, b));
        assert_eq!(places, [Place::Drive, Place::Memory, Place::Came, Place::Went]);
    }
}
