//! A request from its arrival to the end of its last answer: loads the model, waits, and runs all answers side by side.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, SelectAll, Stream, StreamExt};
use tokio::time::{Instant, timeout, timeout_at};

use crate::answer::{Answer, KEEP_ALIVE, Step, Waiting};
use crate::app::App;
use crate::ask::Ask;
use crate::error::{ApiError, Kind};
use crate::hygiene;
use crate::served::Served;

/// Time for checking a request before its response begins. Later errors cannot have a status of their own.
const SETTLE: Duration = Duration::from_secs(3);

type Starting = Pin<Box<dyn Future<Output = Result<Vec<Answer>, ApiError>> + Send>>;
/// Steps of several answers.
pub type Going = SelectAll<Pin<Box<dyn Stream<Item = (usize, Step)> + Send>>>;

/// The answers to a request. Dropping it ends them.
pub struct Run {
    state: State,
    told: Instant,
    served: Option<Arc<Served>>,
    queued: usize,
    prompt: Option<usize>,
}

enum State {
    Starting(Starting),
    Going(Going),
    Over,
}

impl Run {
    /// Starts a request. Returns once its answers have been put into the queue, or after a while.
    ///
    /// # Errors
    /// If the request is invalid, as far as that is known by then.
    pub async fn begin(app: &Arc<App>, ask: Ask) -> Result<Run, ApiError> {
        Self::begin_all(app, vec![ask]).await
    }

    /// The same for several requests to one model; their answers are numbered consecutively.
    ///
    /// # Errors
    /// Like [`Run::begin`]; if there is an error, none of them is served.
    pub async fn begin_all(app: &Arc<App>, asks: Vec<Ask>) -> Result<Run, ApiError> {
        let starting = Box::pin(start(Arc::clone(app), asks));
        let mut run =
            Run { state: State::Starting(starting), told: Instant::now(), served: None, queued: 0, prompt: None };
        match timeout(SETTLE, run.settle()).await {
            Ok(settled) => settled.map(|()| run),
            Err(_) => Ok(run),
        }
    }

    /// The model, once it is loaded.
    pub fn served(&self) -> Option<&Arc<Served>> {
        self.served.as_ref()
    }

    /// Number of generations that came before it when it was put into the queue.
    pub fn queue_position(&self) -> usize {
        self.queued
    }

    /// Tokens of the prompt, once known: when the model is loaded and the answers are in its queue.
    pub fn prompt_tokens(&self) -> Option<usize> {
        self.prompt
    }

    /// The next step of any answer, with the answer's index, at least every few seconds; `None` after the last.
    pub async fn next(&mut self) -> Option<(usize, Step)> {
        loop {
            match &mut self.state {
                State::Over => return None,
                State::Going(going) => return going.next().await,
                State::Starting(_) => match timeout_at(self.told + KEEP_ALIVE, self.settle()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => return Some((0, Step::Failed(error))),
                    Err(_) => {
                        self.told = Instant::now();
                        return Some((0, Step::Waiting(Waiting::Loading)));
                    }
                },
            }
        }
    }

    async fn settle(&mut self) -> Result<(), ApiError> {
        let State::Starting(starting) = &mut self.state else { return Ok(()) };
        let outcome = starting.await;
        self.state = State::Over;
        let answers = outcome?;
        self.served = answers.first().map(|answer| Arc::clone(answer.served()));
        self.queued = answers.first().map_or(0, Answer::queue_position);
        self.prompt = answers.first().map(Answer::prompt_tokens);
        self.state = State::Going(side_by_side(answers));
        Ok(())
    }
}

/// The steps of all of these answers as they arrive, each with the answer's index.
pub fn side_by_side(answers: Vec<Answer>) -> Going {
    let steps = |(index, answer): (usize, Answer)| {
        let next = move |mut answer: Answer| async move { Some(((index, answer.next().await?), answer)) };
        stream::unfold(answer, next).boxed()
    };
    answers.into_iter().enumerate().map(steps).collect()
}

async fn start(app: Arc<App>, mut asks: Vec<Ask>) -> Result<Vec<Answer>, ApiError> {
    asks.iter_mut().for_each(|ask| hygiene::apply(&app.options, ask));
    let Some(first) = asks.first() else { return Ok(Vec::new()) };
    let (total, queue) = (asks.iter().map(|ask| ask.n.max(1)).sum::<usize>(), app.options.queue);
    if total > queue {
        let message = format!("{total} answers do not fit into a queue of {queue}: ask for fewer, or raise --queue");
        return Err(ApiError::field("n", message));
    }
    let served = app.models.get(&first.model).await?;
    let _turn = app.preparing.acquire().await;
    let shared = Arc::clone(&app);
    // Templates, tokenizers and grammars compute for milliseconds, or for seconds if the text is long.
    let start = move || {
        let app = shared;
        let mut answers = Vec::new();
        for ask in &asks {
            if app.options.log_prompts {
                tracing::info!(api = ask.api, model = ask.model, input = ?ask.input, "request");
            }
            let forced = app.options.force.as_ref().and_then(|force| force(ask));
            answers.extend(served.start(ask, forced.as_ref(), &app.live)?);
        }
        Ok(answers)
    };
    let started = tokio::task::spawn_blocking(start).await;
    started
        .unwrap_or_else(|_| Err(ApiError::new(Kind::Internal, "the request could not be prepared: the log says why")))
}
