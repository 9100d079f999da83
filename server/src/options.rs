//! How a server is set up.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sluice_generate::Drafts;
use sluice_grammar::Form;
use sluice_model::engine::EngineOptions;

use crate::ask::Ask;
use crate::guard::Guard;

/// Forces what a model answers, for tests of protocols: the form that the text must have, if the function has one for a request.
pub type Force = Arc<dyn Fn(&Ask) -> Option<Form> + Send + Sync>;

/// How a server is set up.
#[derive(Clone)]
pub struct ServerOptions {
    /// The model files. Each is served under its name without the extension.
    pub files: Vec<PathBuf>,
    /// Where to listen.
    pub address: SocketAddr,
    /// Who may ask.
    pub guard: Guard,
    /// How models are opened. The budget is shared by all of them.
    pub engine: EngineOptions,
    /// Generations that run at a time; `None`: as many as there are pages for.
    pub parallel: Option<usize>,
    /// Generations that may wait. Beyond that, clients are told to come again.
    pub queue: usize,
    /// Where sequences are kept, so that they survive a restart.
    pub sessions: Option<SessionOptions>,
    /// Where files and batches are kept; `None`: there are none.
    pub batches: Option<BatchOptions>,
    /// An idle model gives its memory back after this time.
    pub rest_after: Option<Duration>,
    /// Most bytes of a request.
    pub max_body: usize,
    /// How long answers may take to end once the server is told to end.
    pub grace: Duration,
    /// Who proposes tokens, which one step checks together.
    pub drafts: Drafts,
    /// Tokens that are always proposed; `None`: as many as pay.
    pub draft_tokens: Option<usize>,
    /// Whether logs may contain what clients write.
    pub log_prompts: bool,
    /// Whether the parts of a prompt that agents change on every call are made the same again, see [`hygiene`](crate::hygiene).
    pub normalise: bool,
    /// For tests of protocols: forces what the model answers.
    pub force: Option<Force>,
}

/// Where sequences are kept.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// The folder.
    pub folder: PathBuf,
    /// The most bytes of its files.
    pub max_bytes: u64,
    /// Files that nobody has used for this time are deleted.
    pub expire_after: Option<Duration>,
}

/// Where files and batches are kept.
#[derive(Clone, Debug)]
pub struct BatchOptions {
    /// The folder.
    pub folder: PathBuf,
    /// The most bytes of a file that is uploaded.
    pub largest_file: u64,
    /// The most bytes of all files when one is uploaded.
    pub max_bytes: u64,
}

impl BatchOptions {
    /// A folder with the bounds that OpenAI has for a file, and room for many of them.
    pub fn new(folder: PathBuf) -> Self {
        BatchOptions { folder, largest_file: 200 << 20, max_bytes: 20 << 30 }
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            files: Vec::new(),
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            guard: Guard::default(),
            engine: EngineOptions::default(),
            parallel: None,
            queue: 64,
            sessions: None,
            batches: None,
            rest_after: Some(Duration::from_secs(300)),
            max_body: 32 << 20,
            grace: Duration::from_secs(30),
            drafts: Drafts::Off,
            draft_tokens: None,
            log_prompts: false,
            normalise: false,
            force: None,
        }
    }
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the keys.
        f.debug_struct("ServerOptions")
            .field("files", &self.files)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}
