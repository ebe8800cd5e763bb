//go:build race

package images_test

// raced: the race detector watches, ten times slower. Tests that run one
// goroutine at a time by design have little to show it, and do less.
const raced = true
