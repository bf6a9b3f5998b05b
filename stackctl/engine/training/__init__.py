"""Train one adapter on a frozen, active stack, prove it, and register it whole or not at all."""
