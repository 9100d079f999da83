//! `/v1/responses/compact`: the model sums up a conversation, and the summary stands for it in later requests.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use sluice_dialect::Piece;

use super::handlers::{blocking, renamed};
use super::reasoning;
use super::reply::usage;
use super::request::ResponsesRequest;
use crate::answer::{Step, Usage, Why};
use crate::api::body::Json;
use crate::api::openai::{new_id, now};
use crate::app::App;
use crate::ask::Ask;
use crate::error::{ApiError, Flavour, Kind};
use crate::reply::{Fold, whole};
use crate::run::Run;

/// What the model is asked for at the end of the conversation.
const PROMPT: &str = "Sum up our conversation for someone who will continue it in your place and sees nothing else of it. Keep what \
                      I want, what was decided and done, names, numbers and wordings that matter, and what is still open. Write only \
                      the summary.";
/// Most tokens of a summary, with the thinking before it.
const MOST_TOKENS: i64 = 4096;

/// A request.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct CompactRequest {
    /// The model's name.
    pub model: Option<String>,
    /// A text, or items: messages, calls, outputs of calls, reasoning.
    #[serde(default)]
    #[schema(schema_with = super::schema::input)]
    pub input: Value,
    /// What the summary should keep, besides what it keeps in any case.
    pub instructions: Option<String>,
    /// The stored response with which the conversation ends before `input`.
    pub previous_response_id: Option<String>,
    /// A hint that is not needed here.
    pub prompt_cache_key: Option<String>,
}

impl CompactRequest {
    /// Checks the request, and translates it. `history`: items of the responses before its own; `model`: the name of the model that was
    /// found.
    fn ask(self, model: String, history: &[Value]) -> Result<Ask, ApiError> {
        let last = match &self.instructions {
            Some(wanted) => format!("{PROMPT}\n\n{wanted}"),
            None => PROMPT.to_owned(),
        };
        let request =
            ResponsesRequest { input: self.input, max_output_tokens: Some(MOST_TOKENS), ..ResponsesRequest::default() };
        Ok(request.prepare_with(model, history, Some(&last))?.ask)
    }
}

/// Sums up a conversation.
pub async fn compact(State(app): State<Arc<App>>, Json(request): Json<CompactRequest>) -> Response<Body> {
    let begun = async {
        app.open()?;
        let name = request.model.as_deref().ok_or_else(|| {
            ApiError::field("model", "`model` is missing: /v1/models lists them").code("missing_required_parameter")
        })?;
        let model = app.models.find(name)?.id.clone();
        let store = Arc::clone(&app.responses);
        let ask = blocking(move || {
            let history = store.history_of(request.previous_response_id.as_deref())?;
            request.ask(model, &history)
        });
        Run::begin(&app, ask.await?).await.map_err(renamed)
    };
    match begun.await {
        Err(error) => error.response(Flavour::OpenAi),
        Ok(run) => whole(run, CompactFold::default(), Flavour::OpenAi).await,
    }
}

/// Makes the object of a summary.
#[derive(Default)]
struct CompactFold {
    text: String,
    usage: Usage,
    /// Whether the summary was cut off.
    cut: bool,
}

impl Fold for CompactFold {
    fn step(&mut self, _: usize, step: Step) -> Result<(), ApiError> {
        match step {
            Step::Piece(Piece::Text(text), _) => self.text += &text,
            Step::End(ending) => {
                (self.usage, self.cut) = (ending.usage, ending.why == Why::Length);
                if self.text.trim().is_empty() {
                    let message = "the model has not written a summary: try again, or send the items themselves";
                    return Err(ApiError::new(Kind::Internal, message));
                }
            }
            Step::Failed(error) => return Err(error),
            Step::Piece(..) | Step::Waiting(_) | Step::Echo(..) => {}
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Value {
        let reason = self.cut.then(|| json!({"reason": "max_output_tokens"}));
        json!({
            "id": new_id("resp_"),
            "object": "response.compaction",
            "created_at": now(),
            "incomplete_details": reason,
            "output": [{"type": "compaction", "id": new_id("cmp_"), "encrypted_content": reasoning::sealed(self.text.trim())}],
            "usage": usage(&self.usage),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Ending;

    #[test]
    fn a_summary_is_the_text_and_nothing_else() {
        let ended = |why| Step::End(Ending { why, usage: Usage { prompt: 9, generated: 4, ..Usage::default() } });
        let mut fold = CompactFold::default();
        fold.step(0, Step::Piece(Piece::Thinking("Hm.".into()), Vec::new())).unwrap();
        assert!(fold.step(0, ended(Why::Done)).is_err(), "it has only thought");
        fold.step(0, Step::Piece(Piece::Text(" It is 4. ".into()), Vec::new())).unwrap();
        fold.step(0, ended(Why::Length)).unwrap();
        let made = Box::new(fold).finish();
        assert_eq!(made["output"][0]["encrypted_content"], reasoning::sealed("It is 4."));
        assert_eq!(
            (&made["usage"]["total_tokens"], &made["incomplete_details"]["reason"]),
            (&json!(13), &json!("max_output_tokens"))
        );
    }

    #[test]
    fn the_request_comes_last_with_the_clients_wishes() {
        let request =
            CompactRequest { input: "Hello.".into(), instructions: Some("Keep prices.".into()), ..Default::default() };
        let ask = request.ask("demo".into(), &[]).unwrap();
        let crate::ask::Input::Chat(chat) = ask.input else { panic!("it is a conversation") };
        let last = chat.messages.last().unwrap().fields["content"].as_str().unwrap();
        assert!(last.starts_with("Hello.\n\nSum up") && last.ends_with("\n\nKeep prices."), "{last}");
        assert!(CompactRequest::default().ask("demo".into(), &[]).is_err(), "there is nothing to sum up");
    }
}
