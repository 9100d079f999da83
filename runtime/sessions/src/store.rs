//! The store: a tree of segments, and a thread that writes them.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::SystemTime;

use sluice_format::open_no_link;
use sluice_model::session::{Binding, SegmentFile, SessionError};
use sluice_model::{Engine, GENERATED, Sequence};

use crate::folder::{Folder, Scan};
use crate::name::SegmentId;
use crate::tree::{Node, Segment};
use crate::writer::{self, Shared, Waiting};
use crate::{SessionEntry, StoreError, StoreOptions, Usage};

/// Stored tokens with which a text begins. As long as this value lives, its segments are not deleted to make room.
#[derive(Clone, Debug)]
pub struct Found {
    /// The segments, from the first token on.
    chain: Vec<Arc<Segment>>,
    /// The tokens that a sequence can have.
    tokens: Vec<u32>,
    matched: usize,
}

impl Found {
    /// Tokens of the sequence that [`Store::restore`] gives. These may be fewer than [`matched`](Self::matched) in models with windows
    /// or recurrent states, which continue only where a sequence was saved or marked.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens that are stored and agree with the text.
    pub fn matched(&self) -> usize {
        self.matched
    }

    /// The id of the session.
    pub fn id(&self) -> String {
        self.chain.last().expect("what was found has a segment").id.to_string()
    }
}

/// Sessions in a folder. Several threads can use a store; it has one thread of its own, which writes. When it is dropped, it waits
/// until everything that was given to it is written.
#[derive(Debug)]
pub struct Store {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens the folder, or creates it readable by its owner only. Looks at what it holds, and removes the leftovers of killed
    /// writers.
    ///
    /// # Errors
    /// [`StoreError::Folder`], [`StoreError::Busy`] if another process uses it, [`StoreError::Lock`],
    /// [`StoreError::Thread`].
    pub fn open(options: StoreOptions) -> Result<Store, StoreError> {
        let folder = Folder::open(&options.folder)?;
        let scan: Scan = folder.scan()?;
        let uses = folder.read_uses();
        let shared = Arc::new(Shared::new(options, folder, scan, uses));
        let writer = thread::Builder::new().name("sessions".to_owned());
        let of_writer = Arc::clone(&shared);
        let writer = writer.spawn(move || writer::run(&of_writer)).map_err(|source| StoreError::Thread { source })?;
        Ok(Store { shared, writer: Some(writer) })
    }

    /// The longest stored beginning of `tokens`, which have their phases where these are told apart ([`Sequence::phased`]), from which a
    /// sequence can continue. Reads nothing from the drive. A sequence that has
    /// all tokens of a prompt has no logits for the next token, so leave out the last one.
    pub fn longest(&self, binding: Binding, tokens: &[u32]) -> Option<Found> {
        let state = self.shared.lock();
        let walk = state.tree.walk(binding, tokens);
        let (id, position) = walk.best.filter(|best| best.1 > 0)?;
        Some(Found { chain: state.tree.chain(id), tokens: tokens[..position].to_vec(), matched: walk.matched })
    }

    /// Reads the stored tokens into a new sequence of the engine, which then has [`Found::position`] tokens, or fewer if the
    /// engine's context is shorter. It has no marks. Segments that turn out to be damaged are deleted, with those that continue
    /// them.
    ///
    /// # Errors
    /// [`StoreError::Session`]. The caller computes the tokens anew.
    pub fn restore(&self, engine: &Engine, found: &Found) -> Result<Sequence, StoreError> {
        let folder = &self.shared.folder;
        let files = open_chain(folder, &found.chain);
        let restored = files.and_then(|mut files| engine.restore_segments(&mut files, &found.tokens));
        let mut state = self.shared.lock();
        match &restored {
            Ok(_) => {
                let id = found.chain.last().map(|segment| segment.id);
                id.into_iter().for_each(|id| state.tree.touch(id, SystemTime::now()));
                state.dirty = true;
            }
            Err(error) => {
                state.refused();
                // Another segment may have its place by now.
                let same = |segment: &&Arc<Segment>| {
                    state.tree.get(segment.id).is_some_and(|node| Arc::ptr_eq(&node.segment, segment))
                };
                if let Some(id) = culprit(error, folder, &found.chain).as_ref().filter(same).map(|segment| segment.id) {
                    state.condemn(folder, id);
                    self.shared.work.notify_all();
                }
            }
        }
        drop(state);
        Ok(restored?)
    }

    /// Saves a sequence, if it has tokens that are not stored. If the sequence is still in use, pass a fork of it. Returns at once:
    /// another thread writes the sequence. If too many sequences wait, the oldest one that a later one extends is not written; if
    /// there is none, the oldest.
    pub fn keep(&self, sequence: Sequence, title: Option<&str>) {
        if sequence.position() == 0 {
            return;
        }
        let waiting = Waiting { sequence, title: title.map(str::to_owned) };
        let gives_way = self.shared.lock().push(waiting);
        self.shared.work.notify_all();
        // Its pages go back to the pool while nobody waits for the state.
        drop(gives_way);
    }

    /// Notes that a stored text was used, although it did not have to be read.
    pub fn touch(&self, binding: Binding, tokens: &[u32]) {
        let mut state = self.shared.lock();
        if let Some((id, _)) = state.tree.walk(binding, tokens).best {
            state.tree.touch(id, SystemTime::now());
            state.dirty = true;
        }
    }

    /// All sessions, the most recently used first.
    pub fn list(&self) -> Vec<SessionEntry> {
        let mut list: Vec<_> = self.shared.lock().tree.nodes().map(entry).collect();
        list.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| b.tokens.cmp(&a.tokens)).then_with(|| a.id.cmp(&b.id)));
        list
    }

    /// The tokens of all sessions that no other one continues, the most recently used last.
    pub fn texts(&self, binding: Binding) -> Vec<Vec<u32>> {
        let state = self.shared.lock();
        let leaves = state.tree.nodes().filter(|node| node.children.is_empty() && node.segment.info.binding == binding);
        let mut leaves: Vec<_> = leaves.map(|node| (node.history.used, node.segment.id)).collect();
        leaves.sort_by_key(|&(used, _)| used);
        let ids = |mut text: Vec<u32>| {
            if binding.prompt_attention.tells_phases_apart() {
                text.iter_mut().for_each(|token| *token &= !GENERATED);
            }
            text
        };
        leaves.into_iter().map(|(_, id)| ids(text_of(&state.tree.chain(id)))).collect()
    }

    /// Deletes a session and those that continue it; `false` if no session has that id. Sequences that continue it and wait to be
    /// written are given up.
    ///
    /// # Errors
    /// [`StoreError::File`] if a file cannot be deleted.
    pub fn delete(&self, id: &str) -> Result<bool, StoreError> {
        let Some(id) = SegmentId::parse(id) else { return Ok(false) };
        let _files = self.shared.lock_files();
        let mut state = self.shared.lock();
        let chain = state.tree.chain(id);
        let Some(last) = chain.last() else { return Ok(false) };
        let (binding, text) = (last.info.binding, text_of(&chain));
        let given_up = state.give_up(|waiting| waiting.binding() == binding && waiting.phased().starts_with(&text));
        let continued = state.tree.with_continuations(id);
        let texts: Vec<_> = continued.into_iter().map(|id| (binding, text_of(&state.tree.chain(id)))).collect();
        state.deleted.extend(texts);
        let removed = state.tree.remove(id);
        drop(state);
        drop(given_up);
        self.shared.delete(&removed).map(|()| true)
    }

    /// The tokens, as [`longest`](Self::longest) takes them, of the sessions that were [deleted](Self::delete) since the last call. A caller with sequences in memory should
    /// give up those that have or continue these tokens, so that they are not saved again.
    pub fn take_deleted(&self, binding: Binding) -> Vec<Vec<u32>> {
        let mut state = self.shared.lock();
        state.deleted.extract_if(.., |(of, _)| *of == binding).map(|(_, tokens)| tokens).collect()
    }

    /// Waits until everything that was given to [`keep`](Self::keep) is written, or has failed.
    pub fn flush(&self) {
        self.shared.flush();
    }

    /// Gives up the sequences that wait to be written, which frees their pages. Returns how many there were.
    pub fn drop_waiting(&self) -> usize {
        let given_up = self.shared.lock().give_up(|_| true);
        given_up.len()
    }

    /// What the folder holds.
    pub fn usage(&self) -> Usage {
        self.shared.lock().usage()
    }

    /// The last error while the store wrote or made room.
    pub fn last_error(&self) -> Option<Arc<StoreError>> {
        self.shared.lock().last_error.clone()
    }

    /// Deletes all sessions, and the folder if nothing else is in it. Sequences that wait to be written are given up.
    ///
    /// # Errors
    /// [`StoreError::File`] if a file cannot be deleted. The others are deleted nevertheless.
    pub fn discard(mut self) -> Result<(), StoreError> {
        drop(self.shared.lock().give_up(|_| true));
        self.end();
        let deleted = self.shared.delete_all();
        self.shared.folder.remove_all().and(deleted)
    }

    /// Waits until everything is written, and ends the thread that writes.
    fn end(&mut self) {
        self.shared.stop();
        if let Some(writer) = self.writer.take() {
            // If the thread has panicked, it cannot write anything more.
            let _ = writer.join();
        }
    }

    /// Where the sessions are, and how many.
    pub fn options(&self) -> &StoreOptions {
        &self.shared.options
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.end();
    }
}

fn open_chain(folder: &Folder, chain: &[Arc<Segment>]) -> Result<Vec<SegmentFile>, SessionError> {
    let open = |segment: &Arc<Segment>| {
        let path = folder.file(segment.id);
        match open_no_link(&path) {
            Ok(file) => Ok(SegmentFile { file, path }),
            Err(source) => Err(SessionError::Open { path, source }),
        }
    };
    chain.iter().map(open).collect()
}

/// The segment that cannot be used any more, if the error says so.
fn culprit(error: &SessionError, folder: &Folder, chain: &[Arc<Segment>]) -> Option<Arc<Segment>> {
    use SessionError as E;
    let path = match error {
        E::Damaged { path, .. }
        | E::Truncated { path, .. }
        | E::Misplaced { path, .. }
        | E::NotASession { path }
        | E::Version { path, .. }
        | E::Token { path, .. }
        | E::OtherText { path, .. }
        | E::Continues { path, .. } => path,
        E::Open { path, source } if source.kind() == io::ErrorKind::NotFound => path,
        // A link, or something else that is not a regular file.
        E::Open { path, source } if source.kind() == io::ErrorKind::InvalidInput => path,
        _ => return None,
    };
    chain.iter().find(|segment| folder.file(segment.id) == *path).cloned()
}

/// The tokens of a chain.
fn text_of(chain: &[Arc<Segment>]) -> Vec<u32> {
    chain.iter().fold(Vec::new(), |mut text, segment| {
        text.truncate(segment.info.start);
        text.extend(&segment.info.tokens);
        text
    })
}

fn entry(node: &Node) -> SessionEntry {
    let Node { segment, parent, children, history } = node;
    SessionEntry {
        id: segment.id.to_string(),
        parent: parent.map(|id| id.to_string()),
        children: children.iter().map(SegmentId::to_string).collect(),
        binding: segment.info.binding,
        tokens: segment.info.position,
        bytes: segment.bytes,
        created: history.created,
        used: history.used,
        uses: history.uses,
        title: history.title.clone(),
    }
}
