//! Many generations on one engine, and a small interface to it that is enough for most programs.
//!
//! * [`Model`] is the front door: it opens a file, and continues prompts, conversations and batches from any thread,
//! * [`Request`] says what to generate, and [`Event`]s report what has been generated,
//! * [`Generation`] is sampling, stopping and text on top of one sequence; it touches no engine,
//! * [`Draft`] proposes tokens, which a step checks together; [`Constraint`] says which tokens may come next,
//! * [`Scheduler`] runs many generations with one [`Engine`](sluice_model::Engine), on a thread of the caller's.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::path::Path;
//!
//! use sluice_model::EngineOptions;
//! use sluice_generate::{Event, GenerationError, Model, Request};
//! use sluice_text::Message;
//!
//! fn main() -> Result<(), GenerationError> {
//!     let options = EngineOptions { sequences: Some(4), context: Some(2048), ..EngineOptions::default() };
//!     let model = Model::open(Path::new("model.sluice"), &options)?;
//!
//!     // A text, all at once.
//!     let answer = model.complete(model.text("The capital of France is")?)?;
//!     println!("{} ({:?}, {} tokens)", answer.text, answer.finish, answer.usage.generated_tokens);
//!
//!     // A conversation, as it comes. Dropping the handle changes nothing; `cancel` ends the generation.
//!     let request = Request { max_tokens: 100, ..model.chat(&[Message::new("user", "Hello!")])? };
//!     let (sender, events) = std::sync::mpsc::channel();
//!     let _handle = model.submit(request, move |event| match sender.send(event) {
//!         Ok(()) => ControlFlow::Continue(()),
//!         Err(_) => ControlFlow::Break(()),
//!     })?;
//!     for event in events {
//!         if let Event::Text(text) = event {
//!             print!("{text}");
//!         }
//!     }
//!
//!     // Many at once: an expert that several of them need in a step is read once.
//!     let requests = ["One", "Two", "Three"].map(|text| model.text(text)).into_iter().collect::<Result<Vec<_>, _>>()?;
//!     for answer in model.batch(requests) {
//!         println!("{}", answer?.text);
//!     }
//!     Ok(())
//! }
//! ```

mod draft;
mod drive;
mod event;
mod generation;
mod guard;
mod kept;
mod meter;
mod model;
mod predicted;
mod proposing;
mod report;
mod request;
mod room;
pub mod sampler;
mod scheduler;
mod shared;
mod start;
mod text;
mod worth;

pub use draft::{Draft, PromptLookup};
pub use event::{Event, Finish, GenerationError, Usage};
pub use generation::{EventSink, Generation};
pub use model::{Completion, Drain, Model, recommended};
pub use proposing::Drafts;
pub use report::{Pages, Report, Window};
pub use request::{Constraint, Penalties, Priority, Request, Sampled, Shape, WhenFull};
pub use scheduler::{Scheduler, SchedulerOptions, Watch, Work};
pub use shared::{Handle, Place, Status, Submitter, Totals};

pub use crate::sampler::{Logprob, SamplerConfig};
