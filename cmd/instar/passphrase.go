package main

import (
	"fmt"
	"os"

	"golang.org/x/term"

	"github.com/instar-image/instar/bundle/keys"
)

// askPassphrase asks on the terminal for the passphrase of a private key; nil
// where there is none to ask on.
func (a *app) askPassphrase() keys.Passphrase {
	in, ok := a.stdin.(*os.File)
	if !ok || a.batch || !term.IsTerminal(int(in.Fd())) {
		return nil
	}
	return func(path string) ([]byte, error) {
		fmt.Fprintf(a.stderr, "Passphrase of %s: ", shown(path))
		defer fmt.Fprintln(a.stderr)
		return term.ReadPassword(int(in.Fd()))
	}
}
