//go:build !race

package lazyroot

const raced = false
