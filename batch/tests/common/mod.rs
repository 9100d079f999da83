//! What the tests of batches share: files that fail as a seed says, and an answerer that needs no model.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use sluice_batch::{
    Access, Answerer, Ending, Event, Failure, Files, Job, Ongoing, OpenFile, SystemFiles, Token, number_of,
};

/// Random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Some bytes are written, and then the drive is full.
    Full,
    /// An operation fails.
    Broken,
    /// Nothing: writes and reads only do a part of what they are asked for.
    Short,
    /// Nothing works any more, as for a process that is killed in the middle of a write.
    Killed,
    /// The same, and of what was not synced some is lost or zeros.
    PowerCut,
}

pub const FAULTS: [Fault; 5] = [Fault::Full, Fault::Broken, Fault::Short, Fault::Killed, Fault::PowerCut];

#[derive(Debug)]
struct State {
    random: Random,
    fault: Fault,
    /// Operations before the fault.
    left: u64,
    /// Whether it has come.
    fired: bool,
    /// What of each file is safe.
    synced: BTreeMap<PathBuf, Vec<u8>>,
}

/// Files of which an operation fails.
#[derive(Clone, Debug)]
pub struct FaultyFiles(Arc<Mutex<State>>);

#[derive(Debug)]
struct FaultyFile {
    inner: Box<dyn OpenFile>,
    path: PathBuf,
    state: Arc<Mutex<State>>,
}

impl FaultyFiles {
    /// The fault comes after `left` operations.
    pub fn new(seed: u64, fault: Fault, left: u64) -> Self {
        let (random, synced) = (Random(seed), BTreeMap::new());
        FaultyFiles(Arc::new(Mutex::new(State { random, fault, left, fired: false, synced })))
    }

    /// Whether the fault has come.
    pub fn has_fired(&self) -> bool {
        self.0.lock().unwrap().fired
    }

    /// What a power cut leaves of the files, if there was one.
    pub fn settle(&self) {
        let mut state = self.0.lock().unwrap();
        if !state.fired || state.fault != Fault::PowerCut {
            return;
        }
        for (path, synced) in state.synced.clone() {
            let now = fs::read(&path).unwrap_or_default();
            if !now.starts_with(&synced) {
                continue;
            }
            let new = (now.len() - synced.len()) as u64;
            let kept = synced.len() + state.random.below(new + 1) as usize;
            let mut left = now[..kept].to_vec();
            if state.random.below(2) == 0 {
                left.resize(now.len(), 0);
            }
            fs::write(&path, left).unwrap();
        }
    }
}

impl State {
    /// One more operation, on so many bytes; how many of these may be moved.
    fn operate(&mut self, bytes: usize, writes: bool) -> io::Result<usize> {
        if self.fault == Fault::Short {
            self.fired = true;
            return Ok(if bytes > 1 { 1 + self.random.below(bytes as u64) as usize } else { bytes });
        }
        if self.fired && matches!(self.fault, Fault::Killed | Fault::PowerCut) {
            return Err(io::Error::other("the process is gone"));
        }
        if self.left > 0 {
            self.left -= 1;
            return Ok(bytes);
        }
        if self.fault == Fault::Full && !writes {
            return Ok(bytes);
        }
        let first = !std::mem::replace(&mut self.fired, true);
        // A part of the bytes arrives first.
        if first && bytes > 1 {
            return Ok(self.random.below(bytes as u64) as usize).and_then(|count| match count {
                0 => Err(self.error()),
                count => Ok(count),
            });
        }
        Err(self.error())
    }

    fn error(&self) -> io::Error {
        match self.fault {
            Fault::Full => io::Error::from_raw_os_error(28),
            _ => io::Error::from_raw_os_error(5),
        }
    }
}

impl Files for FaultyFiles {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn OpenFile>> {
        self.0.lock().unwrap().operate(0, access == Access::Write)?;
        let inner = SystemFiles.open(path, access)?;
        if access == Access::Write {
            let now = fs::read(path)?;
            self.0.lock().unwrap().synced.entry(path.to_owned()).or_insert(now);
        }
        Ok(Box::new(FaultyFile { inner, path: path.to_owned(), state: Arc::clone(&self.0) }))
    }

    fn sync_folder_of(&self, path: &Path) -> io::Result<()> {
        self.0.lock().unwrap().operate(0, true)?;
        SystemFiles.sync_folder_of(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.lock().unwrap().operate(0, true)?;
        SystemFiles.remove(path)
    }
}

impl FaultyFile {
    fn operate(&self, bytes: usize, writes: bool) -> io::Result<usize> {
        self.state.lock().unwrap().operate(bytes, writes)
    }
}

impl OpenFile for FaultyFile {
    fn len(&self) -> io::Result<u64> {
        self.operate(0, false)?;
        self.inner.len()
    }

    fn is_regular(&self) -> io::Result<bool> {
        self.inner.is_regular()
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let count = self.operate(bytes.len(), false)?;
        self.inner.read_at(&mut bytes[..count], offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let count = self.operate(bytes.len(), true)?;
        self.inner.write_at(&bytes[..count], offset)
    }

    fn cut(&self, length: u64) -> io::Result<()> {
        self.operate(0, true)?;
        self.inner.cut(length)?;
        // Whether a cut survives is another matter; here it does.
        let mut state = self.state.lock().unwrap();
        if let Some(synced) = state.synced.get_mut(&self.path) {
            synced.truncate(length as usize);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.operate(0, true)?;
        let now = fs::read(&self.path)?;
        self.state.lock().unwrap().synced.insert(self.path.clone(), now);
        Ok(())
    }

    fn lock(&self) -> io::Result<bool> {
        self.operate(0, false)?;
        self.inner.lock()
    }
}

/// Answers with tokens that follow from the request's name, and makes sure that those of earlier runs are the first of them.
#[derive(Debug, Default)]
pub struct Teller {
    /// Tokens that it was given back, in all runs.
    pub resumed: Mutex<usize>,
}

/// All tokens of an answer.
pub fn tokens(custom_id: &str, answer: usize) -> Vec<Token> {
    let mut random = Random(number_of(custom_id, &format!("answer {answer}")));
    let count = 1 + random.below(40);
    let token = |random: &mut Random| Token {
        id: random.next() as u32,
        logprob: (answer > 0).then_some(-0.5),
        top: if answer > 0 { vec![(random.next() as u32, -1.5)] } else { Vec::new() },
    };
    (0..count).map(|_| token(&mut random)).collect()
}

struct Telling {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Telling {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Answerer for Teller {
    fn begin(&self, job: Job) -> Ongoing {
        *self.resumed.lock().unwrap() += job.sampled.iter().map(Vec::len).sum::<usize>();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || tell(job, &told));
        Box::new(Telling { stop, thread: Some(thread) })
    }
}

fn tell(job: Job, stop: &AtomicBool) {
    let Job { request, line, sampled, events, .. } = job;
    let outcome = match line.body.get("fails").and_then(Value::as_str) {
        Some(code) => {
            let (code, message) = (code.to_owned(), "as it was asked to".to_owned());
            Err(Failure { status: 400, code, message, body: json!({"error": {"message": "no"}}) })
        }
        None => {
            let answers = line.wanted().answers as usize;
            let mut said = Vec::new();
            for answer in 0..answers {
                let all = tokens(&line.custom_id, answer);
                let known = sampled.get(answer).cloned().unwrap_or_default();
                if !all.starts_with(&known) {
                    let message = format!("{}: foreign tokens", line.custom_id);
                    return events.send(Event::Broken { request: Some(request), message });
                }
                for token in &all[known.len()..] {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    std::thread::yield_now();
                    events.send(Event::Sampled { request, answer: answer as u32, token: token.clone() });
                }
                said.push(all.iter().map(|token| token.id).collect::<Vec<_>>());
            }
            let generated = said.iter().map(Vec::len).sum::<usize>() as u32;
            Ok(Ending { body: json!({"said": said, "text": line.text()}), generated })
        }
    };
    events.send(Event::Ended { request, outcome });
}
