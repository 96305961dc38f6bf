//! The connection to the coordinator.

use std::time::Duration;

use anello_proto::convert::Word;
use anello_proto::ring::Epoch;
use anello_proto::v1;
use anello_proto::v1::ring_client::RingClient;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Bytes of an order at most: a generation of 4096 members at about 200 bytes.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Words that may wait for the connection.
const WORDS_MAX: usize = 256;
/// Time to connect, and to hear the first order.
const CONNECT: Duration = Duration::from_secs(5);

/// An open connection.
pub(super) struct Link {
    words: mpsc::Sender<v1::FromWorker>,
    /// What the coordinator says; it ends with the connection.
    pub orders: mpsc::Receiver<(Epoch, Word)>,
}

impl Link {
    /// Connects to `coordinator` (`host:port`) and says `hello`.
    ///
    /// # Errors
    /// In words.
    pub async fn open(coordinator: &str, hello: v1::Hello) -> Result<Self, String> {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{coordinator}"))
            .map_err(|cause| format!("{coordinator} is no address ({cause}); give host:port"))?
            .connect_timeout(CONNECT)
            .tcp_nodelay(true);
        let connect = async {
            let channel = endpoint.connect().await.map_err(|cause| causes(&cause))?;
            let mut client = RingClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let (words, outbox) = mpsc::channel(WORDS_MAX);
            let first = v1::FromWorker { word: Some(v1::from_worker::Word::Hello(hello)) };
            words.send(first).await.map_err(|cause| cause.to_string())?;
            let stream =
                client.attach(ReceiverStream::new(outbox)).await.map_err(|status| status.to_string())?;
            Ok::<_, String>((words, stream.into_inner()))
        };
        let (words, mut stream) =
            tokio::time::timeout(CONNECT, connect).await.map_err(|_| "no answer".to_owned())??;
        let (tell, orders) = mpsc::channel(WORDS_MAX);
        tokio::spawn(async move {
            while let Some(message) = stream.next().await {
                let order = match message {
                    Ok(message) => <(Epoch, Word)>::try_from(message),
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

    /// Says something. `false`: the connection is closed, or so slow that it is as good as that.
    pub fn say(&self, word: v1::from_worker::Word) -> bool {
        self.words.try_send(v1::FromWorker { word: Some(word) }).is_ok()
    }
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
