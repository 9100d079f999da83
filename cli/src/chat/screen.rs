//! The output of a chat: answers, thinking, lines of its own, and a transient line.

use std::io::{self, IsTerminal};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::error::CliError;
use crate::terminal::{note, print_as_is, print_text, printable, text_for_terminal, wants_colour};

/// Columns of a terminal that does not report its width.
const COLUMNS: usize = 80;

/// The kind of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A terminal that obeys escape sequences; `colours`: whether it shows colours.
    Terminal {
        /// Whether to use them.
        colours: bool,
    },
    /// A terminal that can only show text.
    Plain,
    /// Another program, or a file.
    Pipe,
}

impl Kind {
    /// The kind of standard output. `variable` gives the values of environment variables.
    fn of(is_terminal: bool, variable: impl Fn(&str) -> Option<String>) -> Kind {
        match (is_terminal, variable("TERM").is_none_or(|term| term.is_empty() || term == "dumb")) {
            (false, _) => Kind::Pipe,
            (true, true) => Kind::Plain,
            (true, false) => Kind::Terminal { colours: wants_colour(variable, is_terminal) },
        }
    }

    /// The kind of standard output.
    pub(crate) fn of_stdout() -> Kind {
        Kind::of(io::stdout().is_terminal(), |name| std::env::var(name).ok())
    }
}

/// The output of a chat.
#[derive(Debug)]
pub(crate) struct Screen {
    kind: Kind,
    /// Whether the cursor is at the beginning of a line.
    at_start: bool,
    /// Whether the transient line is shown.
    passing: bool,
    dim: bool,
}

impl Screen {
    /// An empty screen.
    pub(crate) fn new(kind: Kind) -> Self {
        Screen { kind, at_start: true, passing: false, dim: false }
    }

    /// The kind of output.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether people read it.
    pub(crate) fn is_terminal(&self) -> bool {
        self.kind != Kind::Pipe
    }

    /// Writes the model's text: on a terminal without anything that the terminal would obey, elsewhere byte for byte.
    pub(crate) fn said(&mut self, text: &str) -> Result<(), CliError> {
        self.bright()?;
        self.model(text)
    }

    /// Writes the model's thinking, dimmed.
    pub(crate) fn thought(&mut self, text: &str) -> Result<(), CliError> {
        self.clear()?;
        if self.kind == (Kind::Terminal { colours: true }) && !self.dim {
            self.dim = true;
            print_as_is("\x1b[2m")?;
        }
        self.model(text)
    }

    fn model(&mut self, text: &str) -> Result<(), CliError> {
        self.clear()?;
        if let Some(last) = text.chars().last() {
            self.at_start = last == '\n';
        }
        print_text(text)
    }

    /// Ends a line that has begun.
    pub(crate) fn end_line(&mut self) -> Result<(), CliError> {
        self.bright()?;
        self.clear()?;
        if !std::mem::replace(&mut self.at_start, true) {
            print_as_is("\n")?;
        }
        Ok(())
    }

    /// Writes a report that the user requested, on separate lines.
    pub(crate) fn report(&mut self, text: &str) -> Result<(), CliError> {
        self.end_line()?;
        print_as_is(&(printable(&text) + "\n"))
    }

    /// Writes a line about the state of the chat, dimmed; only on terminals.
    pub(crate) fn remark(&mut self, text: &str) -> Result<(), CliError> {
        if !self.is_terminal() {
            return Ok(());
        }
        self.end_line()?;
        let text = printable(&text);
        match self.kind {
            Kind::Terminal { colours: true } => print_as_is(&format!("\x1b[2m{text}\x1b[0m\n")),
            _ => print_as_is(&(text + "\n")),
        }
    }

    /// Writes an error to standard error, on a line of its own.
    pub(crate) fn complain(&mut self, text: &str) -> Result<(), CliError> {
        self.end_line()?;
        note(&text);
        Ok(())
    }

    /// Shows a transient line, which any further output replaces. Only on a terminal that can do that.
    pub(crate) fn pass(&mut self, text: &str) -> Result<(), CliError> {
        let Kind::Terminal { colours } = self.kind else { return Ok(()) };
        // In the middle of a line there is no room for it.
        if !self.at_start {
            return Ok(());
        }
        let room = columns().saturating_sub(1);
        let text: String = text_for_terminal(text).chars().take(room).collect();
        let (on, off) = if colours { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
        self.passing = true;
        print_as_is(&format!("\r\x1b[K{on}{text}{off}"))
    }

    fn clear(&mut self) -> Result<(), CliError> {
        if std::mem::take(&mut self.passing) {
            print_as_is("\r\x1b[K")?;
        }
        Ok(())
    }

    fn bright(&mut self) -> Result<(), CliError> {
        if std::mem::take(&mut self.dim) {
            print_as_is("\x1b[0m")?;
        }
        Ok(())
    }
}

/// Columns of the terminal.
pub(crate) fn columns() -> usize {
    tcgetwinsize(io::stdout())
        .ok()
        .map(|size| usize::from(size.ws_col))
        .filter(|&columns| columns > 0)
        .unwrap_or(COLUMNS)
}

/// While this exists, the terminal does not show typed text, which waits for the next prompt. Ctrl-C is still a signal.
pub(crate) struct Quiet(Option<Termios>);

impl Quiet {
    pub(crate) fn new() -> Self {
        let before = Some(io::stdin()).filter(IsTerminal::is_terminal).and_then(|stdin| tcgetattr(stdin).ok());
        if let Some(before) = &before {
            let mut quiet = before.clone();
            quiet.local_modes.remove(LocalModes::ECHO);
            // If this fails, typed text merely appears.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &quiet);
        }
        Quiet(before)
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_say_what_a_terminal_can_do() {
        let kind = |is_terminal: bool, set: &[(&str, &str)]| {
            let value = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
            Kind::of(is_terminal, value)
        };
        let (xterm, colours) = (("TERM", "xterm"), |colours| Kind::Terminal { colours });
        assert_eq!(kind(true, &[xterm]), colours(true));
        assert_eq!(kind(true, &[xterm, ("NO_COLOR", "1")]), colours(false));
        assert_eq!(kind(true, &[xterm, ("NO_COLOR", "")]), colours(true), "an empty one does not count");
        assert_eq!(kind(true, &[xterm, ("CLICOLOR", "0")]), colours(false));
        assert_eq!(kind(true, &[xterm, ("CLICOLOR", "1")]), colours(true));
        assert_eq!(kind(true, &[("TERM", "dumb")]), Kind::Plain);
        assert_eq!(kind(true, &[]), Kind::Plain);
        assert_eq!(kind(false, &[xterm]), Kind::Pipe);
    }
}
