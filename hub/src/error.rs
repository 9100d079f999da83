//! Errors of the hub.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why something could not be got from the hub, and what to do about it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A text is not the name of a repository.
    #[error(
        "{text:?} is no name of a model on the hub: {problem}. Names are like deepseek-ai/DeepSeek-R1; @REVISION may follow, \
         and for repositories of GGUF files :QUANT"
    )]
    Name {
        /// What was given.
        text: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A setting of the environment cannot be used.
    #[error("{variable}: {problem}")]
    Setting {
        /// The environment variable.
        variable: &'static str,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A request would be necessary, and requests are forbidden.
    #[error(
        "{what} is not here, and HF_HUB_OFFLINE says that the hub is not asked. Unset it to go on, or have HF_HUB_CACHE name the \
         folder of the hub's own programs that has it"
    )]
    Offline {
        /// What is needed.
        what: String,
    },
    /// The hub hides a repository from requests without a token.
    #[error(
        "{repo}: the hub shows no such repository without a token: it may be private or gated, or not exist. Check the name. \
         If it is private, set HF_TOKEN, or log in with `hf auth login`"
    )]
    NoToken {
        /// The repository.
        repo: String,
    },
    /// The token is not sufficient, or there is none.
    #[error(
        "{repo}: the hub refuses {} ({problem}). Check the name of the repository, and {}",
        if *has_token { "this token" } else { "to show it" },
        if *has_token { "that the token of HF_TOKEN, or of `hf auth login`, is valid and may read it" }
        else { "HF_ENDPOINT; if it is private, set HF_TOKEN, or log in with `hf auth login`" }
    )]
    Refused {
        /// The repository.
        repo: String,
        /// What the hub says.
        problem: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The authors of the model want its terms accepted.
    #[error(
        "{repo} is gated: its authors let in those who accept their terms. Open {page}, accept them there, and {}",
        if *has_token { "try again once access is granted to the account of the token" }
        else { "set HF_TOKEN to a token of that account, or log in with `hf auth login`" }
    )]
    Gated {
        /// The repository.
        repo: String,
        /// Its page.
        page: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// There is no such repository, revision or file.
    #[error("{what} is not on the hub{advice}")]
    Absent {
        /// What was asked for.
        what: String,
        /// What to do, as the rest of the sentence.
        advice: String,
    },
    /// The hub wants fewer requests, and waiting as long as it asked has not helped.
    #[error(
        "{url}: the hub refuses further requests for now ({problem}). Run the same command again later: it goes on"
    )]
    Busy {
        /// The address.
        url: String,
        /// What it says.
        problem: String,
    },
    /// Connections fail.
    #[error(
        "{url}: {problem}, {attempts} times in a row. Check the connection{}; run the same command again: it goes on where it stopped",
        if url.starts_with("https://huggingface.co/") { "" } else { " and HF_ENDPOINT" }
    )]
    Unreachable {
        /// The address.
        url: String,
        /// The last error.
        problem: String,
        /// Attempts that brought no byte.
        attempts: u32,
    },
    /// An answer does not follow the interface of the hub.
    #[error("{url}: {problem}. Check that HF_ENDPOINT, if it is set, names a server that speaks the hub's interface")]
    Protocol {
        /// The address.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// A file has been downloaded several times, and never had the digest that the hub states.
    #[error(
        "{file}: what is downloaded has not the {digest} that the hub states, {attempts} times in a row. Something on the way \
         changes it, or the hub holds a damaged file: try another network, or tell the authors of the repository"
    )]
    Damaged {
        /// The file of the repository.
        file: String,
        /// Kind of digest.
        digest: &'static str,
        /// How often.
        attempts: u32,
    },
    /// The hub's name for a file cannot be the name of a local file.
    #[error(
        "{repo}: the hub names a file {file:?}, which would lie outside the folder of the download, or be taken for something \
         else. Nothing was written"
    )]
    StrangeName {
        /// The repository.
        repo: String,
        /// The file.
        file: String,
    },
    /// It is not clear which files are meant, or there are none.
    #[error("{repo}: {problem}")]
    Selection {
        /// The repository.
        repo: String,
        /// What the problem is, and what to do.
        problem: String,
    },
    /// The files of a repository are not a checkpoint.
    #[error("{problem}")]
    NoCheckpoint {
        /// Which file has what problem, and what to do.
        problem: String,
    },
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The operating system's error.
        source: Arc<io::Error>,
    },
    /// The drive is too small.
    #[error(
        "{path}: {needed} bytes are needed here, and {available} are free. Free some space, or choose another drive"
    )]
    NoSpace {
        /// The folder.
        path: PathBuf,
        /// Bytes still needed.
        needed: u64,
        /// Bytes available.
        available: u64,
    },
    /// Another process downloads or converts to the same place.
    #[error("{path}: another process downloads or converts to this place. Wait for it, or stop it")]
    Locked {
        /// The file or folder that it has locked.
        path: PathBuf,
    },
    /// A folder holds something other than a download of this repository.
    #[error("{path}: {problem}")]
    InTheWay {
        /// The folder or file.
        path: PathBuf,
        /// What is there, and what to do.
        problem: String,
    },
    /// The download was given up because something else failed.
    #[error("the download was stopped")]
    Stopped,
}

impl HubError {
    /// An adapter for `map_err`.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> HubError {
        move |source| HubError::Io { path: path.to_owned(), action, source: Arc::new(source) }
    }
}
