package catalog

import (
	"context"
	"slices"
	"time"
)

// Call says who asks for something.
type Call struct {
	Account string // 12 digits: in whose name
	By      string // who does it in that name: a key's fingerprint, an access key's id; for the history
	DryRun  bool   // find out whether it would be allowed: DryRunOperation if so, UnauthorizedOperation if not
}

// tokenLife is how long a client token is remembered.
const tokenLife = 7 * 24 * time.Hour

// Owned says whether the account owns the image.
func (m *Image) Owned(account string) bool { return m.Owner == account }

// Shared says whether launch permission was given to the account by name.
func (m *Image) Shared(account string) bool {
	_, ok := slices.BinarySearch(m.LaunchAccounts, account)
	return ok
}

// Visible says whether an account may know that the image is there: it owns
// it, or has launch permission, explicit or as everybody, while the image is
// neither deregistered nor disabled nor on its way. To all others it is as if
// it did not exist.
func (m *Image) Visible(account string) bool {
	switch {
	case m.State == Deregistered:
		return false
	case m.Owner == account:
		return true
	}
	return m.State == Available && (m.Public || m.Shared(account))
}

// Launchable says whether an account may start instances of the image now.
func (m *Image) Launchable(account string) bool {
	return m.State == Available && m.Visible(account)
}

// IsDeprecated says whether the deprecation time has come.
func (m *Image) IsDeprecated(now time.Time) bool {
	return !m.Deprecated.IsZero() && !now.Before(m.Deprecated)
}

// notFound is the answer for an image that is not there, and for one the caller
// may not know of: the two must not differ.
func notFound(id string) *Error {
	return refuse(CodeAMINotFound, "The image id '[%s]' does not exist", id)
}

// See gives an image that the account may see; else InvalidAMIID.Malformed,
// .NotFound or, to the owner of one that was deregistered, .Unavailable.
func (l Lookup) See(ctx context.Context, account, id string) (*Image, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	m, err := l.Image(ctx, id)
	if err != nil {
		return nil, err
	}
	switch {
	case m == nil:
		return nil, notFound(id)
	case m.State == Deregistered && m.Owner == account:
		return nil, refuse(CodeAMIUnavailable, "The image id '[%s]' is no longer available", id)
	case !m.Visible(account):
		return nil, notFound(id)
	}
	return m, nil
}

// Own gives an image that the account owns and may change; to others who may
// see it AuthFailure.
func (l Lookup) Own(ctx context.Context, account, id string) (*Image, error) {
	m, err := l.See(ctx, account, id)
	if err != nil {
		return nil, err
	}
	if m.Owner != account {
		return nil, refuse(CodeAuthFailure, "Not authorized for image:%s", id)
	}
	return m, nil
}

// run makes a change in the name of call. With DryRun nothing is changed: f is
// tried, and what it says is what the answer stands for.
func (c *Catalog) run(ctx context.Context, call Call, f func(*Tx) error) error {
	if err := CheckAccount(call.Account); err != nil {
		return err
	}
	if !call.DryRun {
		return c.Update(ctx, f)
	}
	err := c.Read(ctx, func(v *View) error { return f(newTx(v, nil, c.now())) })
	return DryRun(err)
}

// DryRun is the answer to a request with DryRun that would have ended with err.
func DryRun(err error) error {
	switch CodeOf(err) {
	case "":
		return refuse(CodeDryRun, "Request would have succeeded, but DryRun flag is set.")
	case CodeAuthFailure:
		return refuse(CodeUnauthorized, "You are not authorized to perform this operation.")
	}
	return err
}
