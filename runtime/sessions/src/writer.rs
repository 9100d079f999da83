//! The state that threads share, and the thread that writes.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sluice_model::session::{Binding, PrefixHash};
use sluice_model::{PAGE_TOKENS, Sequence};

use crate::folder::{Folder, Scan, Unusable, Uses, title_of};
use crate::name::SegmentId;
use crate::tree::{History, Segment, Tree};
use crate::{StoreError, StoreOptions, Usage};

/// The most sequences that wait to be written. They keep their pages while they wait.
const WAITING_MAX: usize = 8;
/// How often the list of uses is written and expired sessions are deleted, if nothing else happens.
const TIDY_EVERY: Duration = Duration::from_secs(30);
/// The unit, in bytes, in which filesystems allocate space.
const BLOCK: u64 = 4096;

/// A sequence that waits to be written.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) sequence: Sequence,
    pub(crate) title: Option<String>,
}

impl Waiting {
    /// Whether it has all tokens that `other` has.
    fn extends(&self, other: &Waiting) -> bool {
        let (own, other) = (&self.sequence, &other.sequence);
        own.binding() == other.binding() && own.phased().starts_with(other.phased())
    }
}

/// What is known of the folder.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) tree: Tree,
    pub(crate) unusable: Vec<Unusable>,
    pub(crate) waiting: VecDeque<Waiting>,
    /// Sessions that were deleted on demand and that [`Store::take_deleted`](crate::Store::take_deleted) has not
    /// returned yet.
    pub(crate) deleted: Vec<(Binding, Vec<u32>)>,
    /// Files of segments that are no longer in the tree.
    doomed: Vec<PathBuf>,
    counts: Usage,
    pub(crate) last_error: Option<Arc<StoreError>>,
    /// The list of uses has changed.
    pub(crate) dirty: bool,
    /// The list of uses has to be written now, not only at the next regular time.
    hurry: bool,
    busy: bool,
    stopping: bool,
    /// The thread that writes has ended.
    ended: bool,
}

impl State {
    pub(crate) fn failed(&mut self, error: StoreError) {
        self.counts.errors += 1;
        self.last_error = Some(Arc::new(error));
    }

    /// A session could not be read back.
    pub(crate) fn refused(&mut self) {
        self.counts.refused += 1;
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            bytes: self.bytes(),
            files: self.tree.nodes().len() + self.unusable.len(),
            unusable: self.unusable.len(),
            waiting: self.waiting.len() + usize::from(self.busy),
            ..self.counts
        }
    }

    fn bytes(&self) -> u64 {
        self.tree.bytes() + self.unusable.iter().map(|file| file.bytes).sum::<u64>()
    }

    /// Adds a sequence to those that wait. Returns the one that it displaces.
    pub(crate) fn push(&mut self, new: Waiting) -> Option<Waiting> {
        self.waiting.push_back(new);
        if self.waiting.len() <= WAITING_MAX {
            return None;
        }
        let is_extended = |i: usize| self.waiting.iter().skip(i + 1).any(|later| later.extends(&self.waiting[i]));
        let gives_way = (0..self.waiting.len() - 1).find(|&i| is_extended(i)).unwrap_or(0);
        self.counts.dropped += 1;
        self.waiting.remove(gives_way)
    }

    /// Gives up the waiting sequences that `which` selects.
    pub(crate) fn give_up(&mut self, mut which: impl FnMut(&Sequence) -> bool) -> Vec<Waiting> {
        let (gone, stay) = std::mem::take(&mut self.waiting).into_iter().partition(|w: &Waiting| which(&w.sequence));
        self.waiting = Vec::into(stay);
        gone
    }

    /// Removes a damaged segment and those that continue it. The writing thread deletes their files.
    pub(crate) fn condemn(&mut self, folder: &Folder, id: SegmentId) {
        let removed = self.tree.remove(id);
        self.doomed.extend(removed.iter().map(|segment| folder.file(segment.id)));
        self.dirty |= !removed.is_empty();
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.doomed.is_empty() && !self.busy && !self.hurry
    }
}

/// What the threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: StoreOptions,
    pub(crate) folder: Folder,
    state: Mutex<State>,
    /// Held while a thread writes or deletes files, so no thread deletes a file that another has just written.
    files: Mutex<()>,
    /// There is work.
    pub(crate) work: Condvar,
    /// There is no work left.
    idle: Condvar,
}

impl Shared {
    /// The state of a folder that has just been looked at.
    pub(crate) fn new(options: StoreOptions, folder: Folder, scan: Scan, mut uses: Uses) -> Self {
        let mut state = State { unusable: scan.unusable, hurry: true, ..State::default() };
        for (segment, written) in scan.segments {
            let history = uses.take(segment.id, written);
            if let Some(orphan) = state.tree.insert(segment, history) {
                state.unusable.push(folder.unusable(&orphan, written));
            }
        }
        let (work, idle) = (Condvar::new(), Condvar::new());
        Shared { options, folder, state: Mutex::new(state), files: Mutex::new(()), work, idle }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic leaves nothing behind the lock half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_files(&self) -> MutexGuard<'_, ()> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is nothing left to write.
    pub(crate) fn flush(&self) {
        let mut state = self.lock();
        state.hurry |= state.dirty;
        self.work.notify_all();
        while !state.ended && !state.is_idle() {
            state = self.idle.wait_timeout(state, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets the thread that writes end when it has nothing left to do.
    pub(crate) fn stop(&self) {
        let mut state = self.lock();
        (state.stopping, state.hurry) = (true, true);
        self.work.notify_all();
    }

    /// Deletes files whose segments are no longer in the tree.
    pub(crate) fn delete(&self, segments: &[Arc<Segment>]) -> Result<(), StoreError> {
        let mut outcome = Ok(());
        for segment in segments {
            let removed = self.folder.remove(&self.folder.file(segment.id));
            let mut state = self.lock();
            state.dirty = true;
            match removed {
                Ok(()) => state.counts.deleted += 1,
                Err(error) => {
                    state.unusable.push(self.folder.unusable(segment, UNIX_EPOCH));
                    outcome = Err(error);
                }
            }
        }
        outcome
    }
}

/// Wakes the threads that wait, however the writing thread ends.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.idle.notify_all();
    }
}

/// The thread that writes: until the store is dropped, and everything that was waiting is written.
pub(crate) fn run(shared: &Shared) {
    let _ending = Ending(shared);
    loop {
        let mut state = shared.lock();
        if state.is_idle() {
            if state.stopping {
                return;
            }
            shared.idle.notify_all();
            state = shared.work.wait_timeout(state, TIDY_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
        let (next, doomed) = (state.waiting.pop_front(), std::mem::take(&mut state.doomed));
        state.busy = true;
        drop(state);
        shared.delete_doomed(doomed);
        match next {
            Some(next) => shared.keep(&next),
            None => shared.tidy(),
        }
        // Free the pages of what was written before any waiting thread learns that it is done.
        shared.lock().busy = false;
    }
}

/// The part of a sequence that has to be written.
struct Plan {
    id: SegmentId,
    start: usize,
    /// The stored tokens before it. They stay as long as this value lives.
    chain: Vec<Arc<Segment>>,
}

impl Shared {
    /// Writes the new part of a sequence.
    fn keep(&self, waiting: &Waiting) {
        let _files = self.lock_files();
        let outcome = match self.plan(waiting) {
            Some(plan) => self.write(waiting, &plan),
            None => Ok(()),
        };
        if let Err(error) = outcome {
            self.lock().failed(error);
        }
    }

    /// The part that has to be written; `None` if all is stored, which is then noted as a use.
    fn plan(&self, Waiting { sequence, title }: &Waiting) -> Option<Plan> {
        let (binding, tokens) = (sequence.binding(), sequence.phased());
        let mut state = self.lock();
        let walk = state.tree.walk(binding, tokens);
        if let Some((id, _)) = walk.best.filter(|best| best.1 == tokens.len()) {
            state.tree.touch(id, SystemTime::now());
            state.dirty = true;
            if let (Some(title), Some(node)) = (title, state.tree.get_mut(id))
                && node.segment.info.position == tokens.len()
            {
                node.history.title = Some(title_of(title));
            }
            return None;
        }
        // A segment has at least one token.
        let start = walk.covered.min((tokens.len() - 1) / PAGE_TOKENS * PAGE_TOKENS);
        let before = PrefixHash::of(&tokens[..start]);
        let id = SegmentId::new(binding, start, before.then(&tokens[start..]));
        let parent = if start > 0 { state.tree.parent_at(binding, start, before) } else { None };
        let chain = parent.map(|parent| state.tree.chain(parent)).unwrap_or_default();
        Some(Plan { id, start, chain })
    }

    fn write(&self, waiting: &Waiting, plan: &Plan) -> Result<(), StoreError> {
        let Waiting { sequence, title } = waiting;
        let len = sequence.saved_len(plan.start)?;
        self.make_room(len.next_multiple_of(BLOCK), sequence.position(), &plan.chain)?;
        let segment = self.folder.write(plan.id, sequence, plan.start)?;
        let now = SystemTime::now();
        let history = History { created: now, used: now, uses: 0, title: title.as_deref().map(title_of) };
        let mut state = self.lock();
        // The segment that it continues may have been deleted meanwhile.
        if let Some(orphan) = state.tree.insert(segment, history) {
            drop(state);
            return self.folder.remove(&self.folder.file(orphan.id));
        }
        state.counts.written += 1;
        (state.dirty, state.hurry) = (true, true);
        drop(state);
        // The filesystem may have used more space than expected.
        self.make_room(0, sequence.position(), &plan.chain)
    }

    /// Deletes the segments that are needed least, until this many bytes are free.
    fn make_room(&self, bytes: u64, tokens: usize, chain: &[Arc<Segment>]) -> Result<(), StoreError> {
        let most = self.options.max_bytes;
        let mut state = self.lock();
        let held = state.tree.bytes() - state.tree.removable(chain);
        let room = most.saturating_sub(held);
        if bytes > room {
            let folder = self.options.folder.clone();
            return Err(StoreError::Full { folder, tokens, bytes, room, most });
        }
        while state.bytes() + bytes > most {
            let unusable = state.unusable.pop();
            let leaf = if unusable.is_none() { state.tree.remove_least_useful(SystemTime::now()) } else { None };
            drop(state);
            // The first error ends the loop, so it does not try again for ever.
            match (unusable, leaf) {
                (Some(file), _) => self.delete_unusable(file)?,
                (None, Some(leaf)) => self.delete(&[leaf])?,
                // All remaining segments are in use.
                (None, None) => return Ok(()),
            }
            state = self.lock();
        }
        Ok(())
    }

    /// Deletes all sessions, and the files that cannot be used.
    pub(crate) fn delete_all(&self) -> Result<(), StoreError> {
        let _files = self.lock_files();
        let mut state = self.lock();
        let roots = state.tree.nodes().filter(|node| node.parent.is_none()).map(|node| node.segment.id);
        let roots: Vec<_> = roots.collect();
        let removed: Vec<_> = roots.into_iter().flat_map(|root| state.tree.remove(root)).collect();
        let unusable = std::mem::take(&mut state.unusable);
        drop(state);
        let deleted = self.delete(&removed);
        unusable.into_iter().map(|file| self.delete_unusable(file)).fold(deleted, Result::and)
    }

    fn delete_unusable(&self, file: Unusable) -> Result<(), StoreError> {
        let removed = self.folder.remove(&file.path);
        let mut state = self.lock();
        match &removed {
            Ok(()) => state.counts.deleted += 1,
            // Put it behind the others: the next one may be easier to delete.
            Err(_) => state.unusable.insert(0, file),
        }
        removed
    }

    fn delete_doomed(&self, doomed: Vec<PathBuf>) {
        if doomed.is_empty() {
            return;
        }
        let _files = self.lock_files();
        for path in doomed {
            let removed = self.folder.remove(&path);
            let mut state = self.lock();
            match removed {
                Ok(()) => state.counts.deleted += 1,
                Err(error) => state.failed(error),
            }
        }
    }

    /// Deletes expired sessions and those beyond the limit, and writes the list of uses.
    fn tidy(&self) {
        let _files = self.lock_files();
        // One of these can fail without the others.
        for outcome in [self.expire(), self.make_room(0, 0, &[]), self.write_uses()] {
            if let Err(error) = outcome {
                self.lock().failed(error);
            }
        }
    }

    fn expire(&self) -> Result<(), StoreError> {
        let Some(after) = self.options.expire_after else { return Ok(()) };
        let now = SystemTime::now();
        let mut state = self.lock();
        let removed = state.tree.remove_expired(now, after);
        let is_old = |file: &mut Unusable| now.duration_since(file.modified).is_ok_and(|age| age >= after);
        let unusable: Vec<_> = state.unusable.extract_if(.., is_old).collect();
        drop(state);
        let deleted = self.delete(&removed);
        unusable.into_iter().map(|file| self.delete_unusable(file)).fold(deleted, Result::and)
    }

    fn write_uses(&self) -> Result<(), StoreError> {
        let mut state = self.lock();
        state.hurry = false;
        if !std::mem::take(&mut state.dirty) {
            return Ok(());
        }
        let mut uses = Uses::default();
        state.tree.nodes().for_each(|node| uses.add(node.segment.id, &node.history));
        drop(state);
        self.folder.write_uses(&uses)
    }
}
