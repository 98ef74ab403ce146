"""What the tests are made with: guests, frontends, interfaces, and waiting for them."""
