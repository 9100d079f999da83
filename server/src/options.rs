//! The configuration of a server.

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

/// Forces the form of a model's answer, for tests of protocols: the function returns the form for a request, or `None`.
pub type Force = Arc<dyn Fn(&Ask) -> Option<Form> + Send + Sync>;

/// The configuration of a server.
#[derive(Clone)]
pub struct ServerOptions {
    /// The model files. Each is served under its name without the extension.
    pub files: Vec<PathBuf>,
    /// Address at which the server listens.
    pub address: SocketAddr,
    /// Access control.
    pub guard: Guard,
    /// How models are opened. The budget is shared by all of them.
    pub engine: EngineOptions,
    /// Generations that run at the same time; `None`: as many as there are pages for.
    pub parallel: Option<usize>,
    /// Generations that may wait. Beyond that, clients are told to try again later.
    pub queue: usize,
    /// Storage of sequences, so that they survive a restart.
    pub sessions: Option<SessionOptions>,
    /// Storage of files and batches; `None`: there are none.
    pub batches: Option<BatchOptions>,
    /// An idle model returns its memory to the system after this time.
    pub rest_after: Option<Duration>,
    /// Most bytes of a request's body.
    pub max_body: usize,
    /// How long running answers may continue once the server is told to end.
    pub grace: Duration,
    /// The source of proposed tokens, which one step checks together.
    pub drafts: Drafts,
    /// Number of tokens that are always proposed; `None`: as many as pay.
    pub draft_tokens: Option<usize>,
    /// Whether logs may contain the contents of requests.
    pub log_prompts: bool,
    /// Whether parts of a prompt that agents change on every call are normalised, see [`hygiene`](crate::hygiene).
    pub normalise: bool,
    /// For tests of protocols: forces the form of answers.
    pub force: Option<Force>,
}

/// Storage of sequences.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// The folder.
    pub folder: PathBuf,
    /// Most bytes of its files.
    pub max_bytes: u64,
    /// Files that have not been used for this time are deleted.
    pub expire_after: Option<Duration>,
}

/// Storage of files and batches.
#[derive(Clone, Debug)]
pub struct BatchOptions {
    /// The folder.
    pub folder: PathBuf,
    /// Most bytes of one uploaded file.
    pub largest_file: u64,
    /// Most bytes of all files together when one is uploaded.
    pub max_bytes: u64,
}

impl BatchOptions {
    /// A folder with OpenAI's limit for one file, and room for many of them.
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
