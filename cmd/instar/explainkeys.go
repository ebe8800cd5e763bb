package main

import (
	"errors"

	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/images"
)

// explainCapture adds what to do when this machine's keys do not do for the
// domain that it captures into: it is new here, or has lost its own.
func explainCapture(err error, m *machine.Machine, domain string) error {
	switch {
	case errors.Is(err, keys.ErrUntrusted):
		return withHint(err, "If that key is one of yours, put its line of its own machine's allowed_signers into %s. Or --domain NAME shares nothing with others.", m.SignersFile())
	case errors.Is(err, keys.ErrNoIdentity):
		return withHint(err, "A machine that is in it lets this one in: instar recipients add --creators --domain %s KEY\nKEY is printed by: grep -o 'age1[0-9a-z]*' IDENTITY (identity.age in the directory of the machine's keys). Or --domain NAME begins another one.\nIf this machine had another identity before, put it back from its copy.", domain)
	}
	return explainImage(err)
}

// explainKeys adds what to do about an image that is signed by a stranger, or
// encrypted to others.
func explainKeys(err error) error {
	switch {
	case errors.Is(err, keys.ErrUntrusted), errors.Is(err, images.ErrNoTrust):
		return withHint(err, "If that key is the right one, its machine's allowed_signers has its line: put it into this machine's, or give --signers FILE.")
	case errors.Is(err, keys.ErrNoIdentity):
		return withHint(err, "--identity FILE names another key. Who can open the image lets you in with: instar recipients add IMAGE KEY")
	}
	return err
}
