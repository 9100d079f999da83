//! How long a batch takes: the course of its requests through the steps that answer them, simulated.
//!
//! The bound of a step ([`Width`](crate::batch::Width)) says how fast many answers come once everything goes well. A batch takes longer: the
//! model has to be opened, memory holds no expert at first, prompts are read between the answers, answers that end leave others alone with the
//! reads, and reading and computing overlap only in part ([`schedule`](crate::schedule)).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use serde::Serialize;
use sluice_format::{ExtentKind, ExtentRecord, ModelFile};
use sluice_kernels::KvType;
use sluice_model::Sequence;
use sluice_model::memory::{Demand, MemoryPlan};

use crate::batch::{Load, Rates, Routing, union_of_layer};
use crate::schedule::{Cores, FFN_SECTIONS, LAYER_SECTIONS, Layer, Numbers, Work, attention_operations, mean_seconds};

/// Tokens over which the time of a step is averaged, and the fewest steps.
const TOKENS: f64 = 192.0;
const STEPS: f64 = 4.0;
/// Levels of the share of experts in memory at which steps are simulated.
const LEVELS: f64 = 32.0;
/// Most requests that are simulated, or as many as this many times those at a time.
const MOST_SIMULATED: usize = 4096;
const WAVES_SIMULATED: usize = 16;
/// Numbers of rows at which passes are simulated, for each doubling.
const ROWS_PER_DOUBLING: f64 = 8.0;

/// A request on its way through a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    /// Tokens to read.
    pub prompt: f64,
    /// Answers to it.
    pub answers: usize,
    /// Tokens to generate of each.
    pub tokens: f64,
}

/// The course of a batch. Times in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Course {
    /// Until the dense parts that stay in memory are there.
    pub opening: f64,
    /// Passes that read prompts; other answers go on meanwhile.
    pub reading: f64,
    /// Steps that only generate.
    pub generating: f64,
    /// All of these.
    pub seconds: f64,
    /// Tokens that are generated.
    pub tokens: f64,
}

/// A model on a machine, with so many answers at a time.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The model.
    pub file: &'a ModelFile,
    /// The budget in bytes; `None`: as much as is useful and available.
    pub budget: Option<u64>,
    /// Type of keys and values.
    pub kv_type: KvType,
    /// What the machine does in a second.
    pub rates: Rates,
    /// What its cores do with the weights of this model.
    pub cores: Cores,
    /// Bytes of memory that it can write for the first time in a second. Virtual machines are slow at this, because their hosts have to find the
    /// memory.
    pub fresh: f64,
    /// By how much more of a step's experts is found in memory than is expected, where not all of them are.
    pub more: f64,
}

/// The tokens of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rows {
    /// Answers that get a token, at this mean position.
    generating: f64,
    position: f64,
    /// Tokens of prompts, and the mean length of a prompt.
    reading: f64,
    prompt: f64,
}

impl Rows {
    fn all(&self) -> f64 {
        self.generating + self.reading
    }
}

/// Simulates steps, each kind once.
struct Steps<'a> {
    place: &'a Place<'a>,
    plan: MemoryPlan,
    routing: Routing,
    parts: Parts,
    /// Experts of the model, and a step's seconds by its rows and the share of experts in memory.
    known: HashMap<(usize, usize, usize), f64>,
    position: f64,
    prompt: f64,
}

impl Course {
    /// The course of these requests, which are answered in this order, `load.planned` for so many at a time. `None` if memory has no room for
    /// them.
    pub fn of(place: &Place<'_>, load: &Load, sequences: usize, items: &[Item]) -> Option<Course> {
        let Place { file, budget, kv_type, rates, .. } = *place;
        let demand = Demand { sequences: load.planned(sequences), ..Demand::one(load.context, kv_type) };
        let plan = MemoryPlan::new(file, budget, demand).ok()?;
        let (prompts, answers) = (items.len().max(1) as f64, load.answers.max(1) as f64);
        let (prompt, answer) = (load.prompt_tokens / prompts, load.answer_tokens / answers);
        let opening = plan.dense as f64 * (1.0 / rates.drive + 1.0 / place.fresh);
        let mut course = Course { opening, ..Course::default() };
        let (routing, parts) = (Routing::of(file.spec()), Parts::of(file));
        let position = prompt + answer / 2.0;
        let mut steps = Steps { place, plan, routing, parts, known: HashMap::new(), position, prompt };
        course.run_sample(&mut steps, sequences.max(1), items);
        course.seconds = course.opening + course.reading + course.generating;
        Some(course)
    }

    /// The requests, or some of them if there are very many: the beginning, with an empty memory, and the end, with few answers left, take the same time
    /// in any case, and what is between them takes as much longer as there are more tokens.
    fn run_sample(&mut self, steps: &mut Steps<'_>, sequences: usize, items: &[Item]) {
        let most = MOST_SIMULATED.max(WAVES_SIMULATED * sequences);
        if items.len() <= most {
            return self.run(steps, sequences, items);
        }
        // One out of each block, not always in the same place: requests can come in turns.
        let (block, mut numbers) = (items.len().div_ceil(most), Numbers(1));
        let choose = |block: &[Item]| block[((numbers.next() * block.len() as f64) as usize).min(block.len() - 1)];
        let some: Vec<Item> = items.chunks(block).map(choose).collect();
        let half: Vec<Item> = some.iter().copied().step_by(2).collect();
        let rows =
            |items: &[Item]| items.iter().map(|item| item.prompt + item.tokens * item.answers as f64).sum::<f64>();
        let mut fewer = Course::default();
        fewer.run(steps, sequences, &half);
        self.run(steps, sequences, &some);
        let more = (rows(items) - rows(&some)) / (rows(&some) - rows(&half)).max(1.0);
        self.reading += more * (self.reading - fewer.reading).max(0.0);
        self.generating += more * (self.generating - fewer.generating).max(0.0);
        self.tokens = items.iter().map(|item| item.tokens * item.answers as f64).sum();
    }

    fn run(&mut self, steps: &mut Steps<'_>, sequences: usize, items: &[Item]) {
        let mut queue = items.iter();
        // When running answers end, in steps since the first.
        let mut ends: BinaryHeap<Reverse<u64>> = BinaryHeap::new();
        let (mut step, mut seen) = (0_u64, 0.0);
        loop {
            let (generating, mut prompts, mut begun) = (ends.len() as f64, 0.0, Vec::new());
            while ends.len() + begun.len() < sequences {
                let Some(item) = queue.next() else { break };
                prompts += item.prompt;
                begun.extend(std::iter::repeat_n(item.tokens.max(1.0).round() as u64, item.answers));
                self.tokens += item.tokens * item.answers as f64;
            }
            if prompts > 0.0 {
                let room = (steps.plan.rows as f64 - generating).max(1.0);
                let passes = (prompts / room).ceil();
                for _ in 0..passes as u64 {
                    let reading = prompts / passes;
                    self.reading +=
                        steps.seconds(generating, reading, seen) + steps.filling(seen, generating + reading);
                    seen += generating + reading;
                }
                step += passes as u64;
            }
            // The pass that ends a prompt gives its first token.
            ends.extend(begun.into_iter().map(|tokens| Reverse(step + tokens - 1)));
            let Some(&Reverse(end)) = ends.peek() else { return };
            let running = ends.len() as f64;
            while step < end {
                // Until memory is full, more is found in it step by step.
                let growing = steps.is_growing(seen);
                let count = if growing { ((end - step) / 8).clamp(1, 32) } else { end - step };
                self.generating += count as f64 * steps.seconds(running, 0.0, seen);
                self.generating += steps.filling(seen, count as f64 * running);
                seen += count as f64 * running;
                step += count;
            }
            while ends.peek().is_some_and(|&Reverse(end)| end <= step) {
                ends.pop();
            }
        }
    }
}

impl Steps<'_> {
    /// Experts in memory after so many rows: all that were used, if they fit.
    fn resident(&self, seen: f64) -> f64 {
        self.routing.union(seen).min(self.plan.slots as f64)
    }

    /// Seconds for the memory of the slots that so many more rows fill for the first time.
    fn filling(&self, seen: f64, more: f64) -> f64 {
        (self.resident(seen + more) - self.resident(seen)) * self.plan.slot_len as f64 / self.place.fresh
    }

    fn is_growing(&self, seen: f64) -> bool {
        self.resident(seen) + 0.5 < self.plan.slots as f64
    }

    /// Seconds of a step with these rows, after so many others.
    fn seconds(&mut self, generating: f64, reading: f64, seen: f64) -> f64 {
        let rounded = |rows: f64| match rows {
            0.0 => 0,
            rows if rows < 16.0 => (rows * ROWS_PER_DOUBLING).round() as usize,
            rows => (1 << 20) + (rows.log2() * ROWS_PER_DOUBLING).round() as usize,
        };
        let all = self.plan.experts.max(1) as f64;
        let level = (self.resident(seen) / all * LEVELS).floor() as usize;
        let key = (rounded(generating), rounded(reading), level);
        if let Some(seconds) = self.known.get(&key) {
            return *seconds;
        }
        let rows = Rows { generating, position: self.position, reading, prompt: self.prompt };
        let found = self.routing.hit_rate((self.plan.slots as f64, self.resident(seen)), rows.all());
        let found = match found {
            _ if seen == 0.0 => 0.0,
            found if found < 1.0 => (found + self.place.more).clamp(0.0, 1.0),
            found => found,
        };
        let count = (TOKENS / rows.all().max(1.0)).max(STEPS).ceil() as usize;
        let seconds = mean_seconds(&self.work(&rows), found, rows.all(), count);
        self.known.insert(key, seconds);
        seconds
    }

    /// The work of a step, layer by layer.
    fn work(&self, rows: &Rows) -> Work {
        let Place { file, kv_type, rates, cores, .. } = *self.place;
        let spec = file.spec();
        let n = rows.all();
        let count = spec.layers.len().max(1) as f64;
        let product =
            |part: Part, rate: f64, rows: f64| (part.bytes / rate).max(2.0 * rows * part.weights / rates.arithmetic);
        // Keys are read once for all rows of a prompt.
        let touched = |position: f64| Sequence::touched(spec, position as usize, kv_type) as f64 / count / cores.keys;
        let prompts = if rows.reading > 0.0 { (rows.reading / rows.prompt.max(1.0)).max(1.0) } else { 0.0 };
        let keys = rows.generating * touched(rows.position) + prompts * touched(rows.prompt);
        let layers = spec.layers.iter().enumerate().map(|(number, layer)| {
            let of = |kind| self.parts.layers[number].get(&kind).copied().unwrap_or_default();
            let operations =
                |rows: f64, position: f64| rows * attention_operations(&layer.attention, position as usize);
            let attending = operations(rows.generating, rows.position) + operations(rows.reading, rows.prompt / 2.0);
            let attending = cores.operations.map_or(0.0, |rate| attending / rate);
            let before = product(of(ExtentKind::Attention), cores.dense, n)
                + product(of(ExtentKind::Router), cores.dense, n)
                + keys.max(attending)
                + LAYER_SECTIONS * cores.section_seconds;
            let dense = of(ExtentKind::Dense);
            let sections = FFN_SECTIONS * cores.section_seconds;
            let shared = if dense.bytes > 0.0 { product(dense, cores.dense, n) + sections } else { 0.0 };
            let (used, rows_each) = layer.ffn.moe.as_ref().map_or((0.0, 0.0), |moe| {
                let used = union_of_layer(moe.experts, moe.top_k, n);
                (used, n * moe.top_k as f64 / used.max(1.0))
            });
            let expert = of(ExtentKind::Expert);
            Layer {
                before,
                shared,
                top_k: used.round() as usize,
                expert: product(expert, cores.experts, rows_each) + sections,
                verify: cores.verify_seconds(expert.bytes),
                read: expert.stored / rates.drive,
                streamed: self.plan.dense_streamed as f64 / count / rates.drive,
            }
        });
        // Of a prompt, only the last token has logits.
        let head = product(self.parts.head, cores.dense, rows.generating + prompts) + cores.section_seconds;
        Work::new(layers.collect(), head, &cores, rates.latency)
    }
}

/// A part of a model.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    /// Bytes in memory.
    bytes: f64,
    /// Bytes on the drive.
    stored: f64,
    weights: f64,
}

/// The parts of a model: those of each layer by kind, of which experts count as one each, and the output head.
struct Parts {
    layers: Vec<HashMap<ExtentKind, Part>>,
    head: Part,
}

impl Parts {
    fn of(file: &ModelFile) -> Self {
        let spec = file.spec();
        let mut parts = Parts { layers: vec![HashMap::new(); spec.layers.len()], head: Part::default() };
        let is_first = |e: &&ExtentRecord| spec.decodes(e) && (e.kind != ExtentKind::Expert || e.index == 0);
        for extent in file.extents().iter().filter(is_first) {
            if let Some(part) = parts.part(extent.kind, extent.layer as usize) {
                part.bytes += extent.padded_len as f64;
                part.stored += extent.stored_len as f64;
            }
        }
        for tensor in file.tensors() {
            if let Some(part) = parts.part(tensor.kind, tensor.layer as usize) {
                part.weights += tensor.weights() as f64;
            }
        }
        parts
    }

    fn part(&mut self, kind: ExtentKind, layer: usize) -> Option<&mut Part> {
        match kind {
            ExtentKind::Head => Some(&mut self.head),
            _ => self.layers.get_mut(layer).map(|parts| parts.entry(kind).or_default()),
        }
    }
}
