//! The connection to the coordinator.

use std::time::Duration;

use anello_configs::Timings;
use anello_proto::convert::Word;
use anello_proto::ring::Epoch;
use anello_proto::v1;
use anello_proto::v1::ring_client::RingClient;
use anello_tls::grpc::{ConnectError, To};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Bytes of an order at most: a generation of 4096 members at about 200 bytes.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Words that may wait for the connection.
const WORDS_MAX: usize = 256;
/// Time in which last words are heard.
const CLOSE: Duration = Duration::from_secs(2);

/// An open connection.
pub(super) struct Link {
    words: mpsc::Sender<v1::FromWorker>,
    /// What the coordinator says; it ends with the connection.
    pub orders: mpsc::Receiver<(Epoch, Word)>,
}

impl Link {
    /// Connects to `coordinator`, wherever its name leads now, and says `hello`. That takes no longer than follows from `silence`, after
    /// which peers are given up, and so it does to notice that its machine acknowledges nothing: one that is gone closes nothing, and
    /// the next coordinator may be on another.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn open(coordinator: &To, hello: v1::Hello, silence: Duration) -> Result<Self, ConnectError> {
        let away = |cause: &dyn ToString| ConnectError::Away(cause.to_string());
        let patience = Timings::connect_within(silence);
        let connect = async {
            let channel = coordinator.connect_talking(patience).await?;
            let mut client = RingClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let (words, outbox) = mpsc::channel(WORDS_MAX);
            let first = v1::FromWorker { word: Some(v1::from_worker::Word::Hello(hello)) };
            words.send(first).await.map_err(|cause| away(&cause))?;
            match client.attach(ReceiverStream::new(outbox)).await {
                Ok(stream) => Ok((words, stream.into_inner())),
                Err(status) => {
                    Err(coordinator.refusal(&status).await.map_or_else(|| away(&status), Into::into))
                }
            }
        };
        let (words, mut stream) =
            tokio::time::timeout(patience, connect).await.map_err(|_| away(&"no answer"))??;
        let (tell, orders) = mpsc::channel(WORDS_MAX);
        tokio::spawn(async move {
            while let Some(message) = stream.next().await {
                let order = match message {
                    Ok(message) => <(Epoch, Word)>::try_from(message),
                    Err(status) if is_told(&status) => {
                        tracing::warn!(reason = status.message(), "the coordinator closes the connection");
                        return;
                    }
                    Err(status) => {
                        tracing::debug!(%status, "the connection to the coordinator is closed");
                        return;
                    }
                };
                match order {
                    Ok(order) => {
                        if tell.send(order).await.is_err() {
                            return;
                        }
                    }
                    Err(malformed) => {
                        tracing::error!(%malformed, "the coordinator says what this build does not understand");
                        return;
                    }
                }
            }
        });
        Ok(Self { words, orders })
    }

    /// Says the last that is to be said, and waits until the coordinator has closed the connection after it.
    pub async fn say_last(self, word: v1::from_worker::Word) {
        let Self { words, mut orders } = self;
        let said = async {
            let _ = words.send(v1::FromWorker { word: Some(word) }).await;
            drop(words);
            while orders.recv().await.is_some() {}
        };
        let _ = tokio::time::timeout(CLOSE, said).await;
    }

    /// Says something. `false`: the connection is closed, or so slow that it is as good as that.
    pub fn say(&self, word: v1::from_worker::Word) -> bool {
        self.words.try_send(v1::FromWorker { word: Some(word) }).is_ok()
    }
}

/// Whether the coordinator says what was wrong with what this worker said: other ends are those of connections and processes.
fn is_told(status: &tonic::Status) -> bool {
    use tonic::Code::{
        Aborted, FailedPrecondition, InvalidArgument, OutOfRange, PermissionDenied, ResourceExhausted,
    };
    let told =
        [Aborted, FailedPrecondition, InvalidArgument, OutOfRange, PermissionDenied, ResourceExhausted];
    told.contains(&status.code())
}
