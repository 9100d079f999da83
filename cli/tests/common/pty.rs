//! A program under a pseudo-terminal: what is typed, and what its screen shows.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZeroU16;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::Winsize;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::termios::tcsetwinsize;

use crate::common::open_terminal;

/// No test waits for a fixed time: this only ends one that would wait for ever.
const PATIENCE: Duration = Duration::from_secs(300);
/// The sequence that a line editor sends when it begins to read a line: it asks the terminal to mark pasted text.
const READY: &str = "\x1b[?2004h";

/// A terminal with a program on it.
pub struct Terminal {
    master: File,
    child: Child,
    screen: vt100::Parser,
    /// The output of the program.
    written: String,
    /// How much of it has been examined.
    seen: usize,
    /// Bytes of an incomplete character.
    rest: Vec<u8>,
    ended: bool,
}

impl Terminal {
    /// Starts a program on a terminal of this size, which is also its controlling terminal.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = open_terminal(Some(&size));
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        command.stdin(slave()).stdout(slave()).stderr(slave());
        // SAFETY: between fork and exec only two system calls are made, which change nothing but the child's session and terminal.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                nix::errno::Errno::result(nix::libc::ioctl(0, nix::libc::TIOCSCTTY as _, 0))?;
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        // This is our last handle: a terminal ends when no process can write to it.
        drop(command);
        drop(pty.slave);
        let master = File::from(pty.master);
        let screen = vt100::Parser::new(lines(rows), lines(columns), 1000);
        Terminal { master, child, screen, written: String::new(), seen: 0, rest: Vec::new(), ended: false }
    }

    /// Types.
    pub fn send(&mut self, keys: &str) {
        let mut left = keys.as_bytes();
        while !left.is_empty() {
            // A terminal holds only some KiB until they are read.
            let part = left.len().min(1024);
            self.master.write_all(&left[..part]).unwrap();
            left = &left[part..];
            self.take(PollTimeout::ZERO);
        }
    }

    /// Types a line and Enter.
    pub fn line(&mut self, line: &str) {
        self.send(&format!("{line}\r"));
    }

    /// Waits until the program reads a line.
    pub fn ready(&mut self) {
        self.see(READY);
    }

    /// Types a line, and waits until the program reads the next one. Returns its output.
    pub fn ask(&mut self, line: &str) -> String {
        let from = self.seen;
        self.line(line);
        self.ready();
        self.written[from..self.seen].to_owned()
    }

    /// Waits until the program has written this text, after the output that was seen before.
    pub fn see(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.written[self.seen..].find(text) {
                self.seen += at + text.len();
                return;
            }
            self.wait(deadline, text);
        }
    }

    /// Waits until the program has written this many more bytes.
    pub fn more(&mut self, bytes: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.written.len() < self.seen + bytes {
            self.wait(deadline, "more text");
        }
        self.seen = self.written.len();
    }

    /// Waits until the screen satisfies `is`.
    pub fn shows(&mut self, what: &str, is: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is(&self.contents()) {
            self.wait(deadline, what);
        }
    }

    fn wait(&mut self, deadline: Instant, what: &str) {
        let gone = self.ended || Instant::now() > deadline;
        assert!(!gone, "no {what:?} on the screen:\n{}\nall: {:?}", self.contents(), self.written);
        self.take(PollTimeout::from(100u8));
    }

    /// Reads the program's output, if there is any in time.
    fn take(&mut self, timeout: PollTimeout) {
        let mut wanted = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if poll(&mut wanted, timeout).unwrap() == 0 {
            return;
        }
        let mut bytes = [0; 1 << 16];
        // On Linux, a terminal without writers ends with an error.
        let count = self.master.read(&mut bytes).unwrap_or(0);
        self.ended = count == 0;
        self.screen.process(&bytes[..count]);
        self.rest.extend(&bytes[..count]);
        let whole = match std::str::from_utf8(&self.rest) {
            Ok(_) => self.rest.len(),
            Err(error) => error.valid_up_to(),
        };
        let text: Vec<u8> = self.rest.drain(..whole).collect();
        self.written += std::str::from_utf8(&text).unwrap();
    }

    /// The contents of the screen.
    pub fn contents(&self) -> String {
        self.screen.screen().contents()
    }

    /// The screen itself.
    pub fn screen(&self) -> &vt100::Screen {
        self.screen.screen()
    }

    /// The whole output of the program.
    pub fn written(&self) -> &str {
        &self.written
    }

    /// Changes the size of the terminal, which the program is told.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
        self.screen.set_size(lines(rows), lines(columns));
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for the end of the program.
    pub fn end(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        while !self.ended {
            assert!(Instant::now() < deadline, "the program does not end:\n{}", self.contents());
            self.take(PollTimeout::from(100u8));
        }
        (self.child.wait().unwrap(), std::mem::take(&mut self.written))
    }
}

fn lines(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).unwrap()
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A failed test leaves nothing running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
