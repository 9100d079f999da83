//! A request from its arrival to the end of its last answer: checks it, loads the model, waits, and runs all answers side by side.

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
use crate::request_id;
use crate::served::Served;
use crate::texts::{Prepared, now};

/// Time for checking a request before its response begins, without its model. This computes, and waits for nothing but others that are checked.
/// The response of what takes longer begins nevertheless, before clients give up.
const CHECK: Duration = Duration::from_secs(30);
/// Time for the model to take a request that is right. Later errors cannot have a status of their own.
const SETTLE: Duration = Duration::from_secs(3);

/// Requests that have been checked, each with what was prepared of it.
type Checked = Vec<(Ask, Prepared)>;
type Starting = Pin<Box<dyn Future<Output = Result<Vec<Answer>, ApiError>> + Send>>;
/// Steps of several answers.
pub type Going = SelectAll<Pin<Box<dyn Stream<Item = (usize, Step)> + Send>>>;

/// The answers to a request. Dropping it ends them.
pub struct Run {
    state: State,
    told: Instant,
    /// The id of the request.
    id: Arc<str>,
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
    /// Starts a request. Returns once it has been checked and its answers are in the queue of the model, or when the model has been loaded
    /// for a while.
    ///
    /// # Errors
    /// If the request is invalid, or the model cannot take it, as far as that is known by then.
    pub async fn begin(app: &Arc<App>, ask: Ask) -> Result<Run, ApiError> {
        Self::begin_all(app, vec![ask]).await
    }

    /// The same for several requests to one model; their answers are numbered consecutively.
    ///
    /// # Errors
    /// Like [`Run::begin`]; if there is an error, none of them is served.
    pub async fn begin_all(app: &Arc<App>, asks: Vec<Ask>) -> Result<Run, ApiError> {
        let mut checking = Box::pin(check(Arc::clone(app), asks));
        let checked = timeout(CHECK, &mut checking).await;
        let is_checked = checked.is_ok();
        let shared = Arc::clone(app);
        let starting: Starting = match checked {
            Ok(checked) => Box::pin(start(shared, checked?)),
            Err(_) => Box::pin(async move { start(shared, checking.await?).await }),
        };
        let (told, id) = (Instant::now(), request_id::current());
        let mut run = Run { state: State::Starting(starting), told, id, served: None, queued: 0, prompt: None };
        if is_checked && let Ok(settled) = timeout(SETTLE, run.settle()).await {
            settled?;
        }
        Ok(run)
    }

    /// The id of the request.
    pub fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// Logs an error that comes after the response has begun, if the server is at fault.
    pub fn note(&self, error: &ApiError) {
        if error.kind.status().is_server_error() {
            let (id, cause, status) = (&*self.id, error.to_string(), error.kind.status().as_u16());
            tracing::error!(id, cause, status, "a response has ended with an error");
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

/// Checks everything about requests that can be said before their model is loaded.
async fn check(app: Arc<App>, mut asks: Vec<Ask>) -> Result<Checked, ApiError> {
    asks.iter_mut().for_each(|ask| hygiene::apply(&app.options, ask));
    let Some(first) = asks.first() else { return Ok(Vec::new()) };
    let (total, queue) = (asks.iter().map(|ask| ask.n.max(1)).sum::<usize>(), app.options.queue);
    if total > queue {
        let message = format!("{total} answers do not fit into a queue of {queue}: ask for fewer, or raise --queue");
        return Err(ApiError::field("n", message));
    }
    app.models.find(&first.model)?;
    let _turn = app.preparing.acquire().await;
    let shared = Arc::clone(&app);
    // Templates, tokenizers and grammars compute for milliseconds, or for seconds if the text is long.
    aside(move || {
        let app = shared;
        let mut checked = Vec::new();
        for ask in asks {
            if app.options.log_prompts {
                tracing::info!(api = ask.api, model = ask.model, input = ?ask.input, "request");
            }
            let entry = app.models.find(&ask.model)?;
            let forced = app.options.force.as_ref().and_then(|force| force(&ask));
            let prepared = match entry.peek() {
                Some(served) => served.prepare(&ask, forced.as_ref())?,
                None => entry.texts(&app.options.engine)?.prepare(&ask, forced.as_ref(), now(), None)?,
            };
            checked.push((ask, prepared));
        }
        Ok(checked)
    })
    .await
}

/// Loads the model, and puts the answers into its queue.
async fn start(app: Arc<App>, checked: Checked) -> Result<Vec<Answer>, ApiError> {
    let Some((first, _)) = checked.first() else { return Ok(Vec::new()) };
    let served = app.models.get(&first.model).await?;
    aside(move || {
        let mut answers = Vec::new();
        for (ask, prepared) in checked {
            let forced = app.options.force.as_ref().and_then(|force| force(&ask));
            answers.extend(served.start(&ask, forced.as_ref(), prepared, &app.live)?);
        }
        Ok(answers)
    })
    .await
}

/// Runs work that computes for a while away from the threads that serve all clients.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::new(Kind::Internal, "the request could not be prepared: the log says why")))
}
