//! The portable read engine: a pool of threads, each blocked in one `pread`.
//!
//! As fast as io_uring for reads of a megabyte, at the cost of one thread per read in flight.
//! It is the only engine on macOS, and the better one where reads go through the page cache.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::error::IoError;
use super::file::DataFile;
use super::{ChunkRead, Completion, EngineInfo, ReadEngine, Wait, Wake};

/// Reads with a pool of threads.
pub struct PreadEngine {
    info: EngineInfo,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    files: Vec<DataFile>,
    state: Mutex<State>,
    /// A read was queued, or the engine is shutting down.
    queued: Condvar,
    /// A read has ended, or someone called `wake`.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<ChunkRead>,
    ended: Vec<Completion>,
    accepted: usize,
    /// Threads that have begun to look for reads.
    started: usize,
    woken: bool,
    stopping: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PreadEngine {
    /// Starts `depth` threads. `why` says in a few words why this engine was chosen.
    ///
    /// # Errors
    /// [`IoError::Thread`] if the system refuses a thread.
    pub fn new(files: Vec<DataFile>, depth: usize, why: &str) -> Result<Self, IoError> {
        assert!(depth > 0, "an engine of depth 0 reads nothing");
        let info = EngineInfo {
            name: "pread",
            note: format!("{depth} reading threads ({why})"),
            depth,
            files: files.iter().map(DataFile::info).collect(),
        };
        let state =
            State { queue: VecDeque::with_capacity(depth), ended: Vec::with_capacity(depth), ..State::default() };
        let shared =
            Arc::new(Shared { files, state: Mutex::new(state), queued: Condvar::new(), ended: Condvar::new() });
        let mut engine = Self { info, shared, threads: Vec::with_capacity(depth) };
        for number in 0..depth {
            let shared = Arc::clone(&engine.shared);
            let thread = std::thread::Builder::new()
                .name(format!("sluice-read-{number}"))
                .spawn(move || read_loop(&shared))
                .map_err(IoError::Thread)?;
            engine.threads.push(thread);
        }
        // A thread allocates while it starts: it does so now rather than during the first tokens.
        let mut state = engine.shared.lock();
        while state.started < depth {
            state = engine.shared.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        Ok(engine)
    }
}

/// What each thread does: take a read, do it, report it.
fn read_loop(shared: &Shared) {
    let mut state = shared.lock();
    state.started += 1;
    shared.ended.notify_one();
    loop {
        if let Some(mut read) = state.queue.pop_front() {
            drop(state);
            let file = &shared.files[usize::from(read.file)];
            let result = loop {
                match file.read_at(read.mem.as_mut_slice(), read.offset) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => break result,
                }
            };
            state = shared.lock();
            state.ended.push(Completion { tag: read.tag, mem: read.mem, result });
            shared.ended.notify_one();
        } else if state.stopping {
            return;
        } else {
            state = shared.queued.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl ReadEngine for PreadEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn submit(&mut self, read: ChunkRead) {
        assert!(usize::from(read.file) < self.shared.files.len(), "no such file");
        let mut state = self.shared.lock();
        assert!(state.accepted < self.info.depth, "more reads than the engine's depth");
        state.accepted += 1;
        state.queue.push_back(read);
        drop(state);
        self.shared.queued.notify_one();
    }

    fn cancel(&mut self, tag: u32) -> Option<ChunkRead> {
        let mut state = self.shared.lock();
        let at = state.queue.iter().position(|read| read.tag == tag)?;
        state.accepted -= 1;
        state.queue.remove(at)
    }

    fn complete(&mut self, ended: &mut Vec<Completion>, wait: Wait) -> io::Result<()> {
        let deadline = match wait {
            Wait::Timeout(timeout) => Instant::now().checked_add(timeout),
            Wait::Poll | Wait::Forever => None,
        };
        let mut state = self.shared.lock();
        while wait != Wait::Poll && state.ended.is_empty() && !state.woken {
            let Some(deadline) = deadline else {
                state = self.shared.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let result = self.shared.ended.wait_timeout(state, left);
            state = result.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.woken = false;
        state.accepted -= state.ended.len();
        ended.append(&mut state.ended);
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.shared) as Arc<dyn Wake>
    }
}

impl Wake for Shared {
    fn wake(&self) {
        self.lock().woken = true;
        self.ended.notify_one();
    }
}

impl Drop for PreadEngine {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        state.queue.clear();
        drop(state);
        self.shared.queued.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has already reported that; there is nothing to add here.
            let _ = thread.join();
        }
    }
}
