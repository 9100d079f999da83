//! A scheduler with its engine, and the events that the owners of generations received.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, channel};

use sluice_generate::{Event, Finish, Handle, Request, Scheduler, SchedulerOptions, Status, Usage, Watch};
use sluice_model::Engine;
use sluice_text::Tokenizer;

/// What an owner received.
#[derive(Debug, Default, PartialEq)]
pub struct Heard {
    /// Tokens.
    pub ids: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why the generation ended.
    pub finish: Option<Finish>,
    /// What went wrong.
    pub error: Option<String>,
    /// Tokens of the prompt that had been read, at each progress event.
    pub read: Vec<usize>,
    /// Dropped tokens and remaining tokens, for each shift.
    pub shifts: Vec<(usize, usize)>,
    /// Token counts from the end of the generation.
    pub usage: Usage,
}

impl Heard {
    fn take(&mut self, event: Event) {
        assert!(self.finish.is_none() && self.error.is_none(), "{event:?} behind the end");
        match event {
            Event::Progress { read, .. } => self.read.push(read),
            Event::Token { id, .. } => self.ids.push(id),
            Event::PromptToken { .. } => {}
            Event::Shifted { dropped, left } => self.shifts.push((dropped, left)),
            Event::Text(text) => self.text += &text,
            Event::Finish { reason, usage } => {
                assert_eq!(usage.generated_tokens, self.ids.len());
                (self.finish, self.usage) = (Some(reason), usage);
            }
            Event::Failed(error) => self.error = Some(error.to_string()),
        }
    }

    /// The result without anything that depends on other generations, such as how the prompt was divided.
    pub fn said(&self) -> (&[u32], &str, Option<Finish>) {
        (&self.ids, &self.text, self.finish)
    }
}

/// An engine, a scheduler, and what the owners received.
pub struct House {
    /// The engine.
    pub engine: Engine,
    /// The scheduler on that engine.
    pub scheduler: Scheduler,
    /// By number of the generation.
    pub owners: BTreeMap<u64, (Handle, Receiver<Event>, Heard)>,
}

impl House {
    /// A scheduler for this engine.
    pub fn new(engine: Engine, options: SchedulerOptions) -> House {
        let tokenizer = Tokenizer::of(engine.file().metadata()).unwrap();
        let scheduler = Scheduler::new(&engine, tokenizer, options);
        House { engine, scheduler, owners: BTreeMap::new() }
    }

    /// Puts a generation into the queue, and returns its number.
    pub fn submit(&mut self, request: Request) -> u64 {
        let (sender, events) = channel();
        let owner = move |event| sender.send(event).map_or(ControlFlow::Break(()), ControlFlow::Continue);
        let handle = self.scheduler.submit(request, owner).unwrap();
        let id = handle.id();
        self.owners.insert(id, (handle, events, Heard::default()));
        id
    }

    /// One turn.
    pub fn turn(&mut self) -> bool {
        self.turn_watched(&mut Watch::default())
    }

    /// One turn with observers.
    pub fn turn_watched(&mut self, watch: &mut Watch<'_>) -> bool {
        let worked = self.scheduler.turn(&mut self.engine, watch);
        for (_, events, heard) in self.owners.values_mut() {
            events.try_iter().for_each(|event| heard.take(event));
        }
        worked
    }

    /// Turns until all generations have ended.
    pub fn run(&mut self) {
        while self.turn() {}
        let Status { queued, reading, decoding, .. } = self.scheduler.status();
        assert_eq!((queued, reading, decoding), (0, 0, 0));
        assert!(self.owners.values().all(|(handle, ..)| handle.place().is_none()), "none is left");
    }

    /// What a generation's owner received.
    pub fn heard(&self, id: u64) -> &Heard {
        &self.owners[&id].2
    }
}
