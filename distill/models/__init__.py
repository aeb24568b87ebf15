"""Who answers: teacher, assistant and student are all a `Reasoner`, whatever stands behind them."""
