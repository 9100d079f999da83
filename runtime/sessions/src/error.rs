//! What can go wrong with a folder of sessions.

use std::io;
use std::path::PathBuf;

use sluice_model::session::SessionError;

/// Why a session could not be kept, restored or deleted.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder.
    #[error(
        "{folder}: the folder of the sessions cannot be used: {source}. Choose another one, or change its permissions"
    )]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the filesystem said.
        source: io::Error,
    },
    /// Another process uses the folder.
    #[error("{folder}: another process keeps its sessions here: choose another folder, or end that process")]
    Busy {
        /// The folder.
        folder: PathBuf,
    },
    /// The folder cannot be locked, so two processes could write in it.
    #[error(
        "{folder}: the filesystem cannot lock the folder of the sessions: {source}. Choose a folder on another filesystem"
    )]
    Lock {
        /// The folder.
        folder: PathBuf,
        /// What the filesystem said.
        source: io::Error,
    },
    /// A file in the folder.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the filesystem said.
        source: io::Error,
    },
    /// A session cannot be written or read, or does not fit the engine.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The session needs more bytes than the folder may have, or than can be freed.
    #[error(
        "{folder}: a session of {tokens} tokens takes {bytes} more bytes, and there is room for {room} of the {most} that the folder \
         may have: raise its limit"
    )]
    Full {
        /// The folder.
        folder: PathBuf,
        /// Tokens of the session.
        tokens: usize,
        /// Bytes of the file that would be written.
        bytes: u64,
        /// Bytes that are free or can be freed.
        room: u64,
        /// The most bytes that the folder may have.
        most: u64,
    },
    /// The thread that writes could not be started.
    #[error("the thread that saves sessions cannot be started: {source}")]
    Thread {
        /// What the system said.
        source: io::Error,
    },
}
