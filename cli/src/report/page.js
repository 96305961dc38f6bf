// The charts of the JSON beside this script.
(() => {
  const at = name => document.getElementById(name);
  anelloCharts(at('charts'), at('tip'), at('key'), JSON.parse(at('data').textContent));
})();
