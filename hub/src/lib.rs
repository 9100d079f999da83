//! The Hugging Face hub: downloads of models, and conversions that need no more room than a few of their files.
//!
//! This is the only crate that opens connections to other machines; a test of the workspace checks that. Requests go
//! through [`Client`], which tries again if that can help, and gives the token only to the hub.
//!
//! | module | does |
//! |---|---|
//! | `name`, `settings` | what users call things, and what the environment says |
//! | `client`, `headers`, `paced` | requests, what answers say, and how slowly they may come |
//! | `snapshot`, `cache` | what a repository holds at a commit; what of it the hub's own programs have downloaded |
//! | `pieces`, `downloads` | files in pieces over several connections, verified and resumable |
//! | `select` | which files are meant |
//! | `pin`, `pull` | a repository becomes a folder |
//! | [`mod@models`] | the folder of models |
//! | `source`, `convert` | a repository becomes a model file |

mod cache;
mod client;
mod convert;
mod digest;
mod downloads;
mod error;
mod headers;
pub mod models;
mod name;
mod paced;
mod pieces;
mod pin;
mod pull;
mod select;
mod settings;
mod snapshot;
mod source;

pub use client::{Client, Notice, Patience};
pub use convert::{HubConversion, Needs};
pub use digest::Digest;
pub use downloads::Observer;
pub use error::HubError;
pub use name::{MAIN, PREFIX, Reference};
pub use pull::{Pull, free_space};
pub use select::{Filter, Form, form, gguf_files, to_pull};
pub use settings::{Settings, Token};
pub use snapshot::{RemoteFile, Snapshot};
