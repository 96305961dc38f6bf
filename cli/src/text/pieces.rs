use tokenizers::Tokenizer;

/// Tokens as the text that each adds to those before it. A letter cut into several tokens goes with its last one; without a
/// tokenizer a token is its id.
pub struct Pieces<'t> {
    tokenizer: Option<&'t Tokenizer>,
    ids: Vec<u32>,
    /// Bytes of the decoded text that were told.
    told: usize,
}

impl<'t> Pieces<'t> {
    /// The text goes on after the tokens `before`.
    pub fn after(before: &[u32], tokenizer: Option<&'t Tokenizer>) -> Self {
        let mut pieces = Self { tokenizer, ids: before.to_vec(), told: 0 };
        pieces.told = pieces.decoded().len();
        pieces
    }

    fn decoded(&self) -> String {
        let text = self.tokenizer.map(|tokenizer| tokenizer.decode(&self.ids, false).unwrap_or_default());
        text.unwrap_or_default().trim_end_matches('\u{fffd}').to_owned()
    }

    /// What `id` adds.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_none() {
            return format!(" {id}");
        }
        self.ids.push(id);
        let text = self.decoded();
        let piece = text.get(self.told..).unwrap_or_default().to_owned();
        self.told = text.len().max(self.told);
        piece
    }
}
