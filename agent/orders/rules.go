package orders

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// Rules are what a machine lets itself be asked for. The zero value lets nothing.
type Rules struct {
	// Accounts are who may ask, by their 12 digits; empty for whomever the
	// catalog's server lets.
	Accounts []string
	// BundleTo are where bundles may go: patterns as path.Match has them of
	// BUCKET/PREFIX, in which * does not stand for a slash. One that ends in a slash is all
	// that begins like it, without patterns. Empty lets no bundle be made.
	BundleTo []string
	// CreateImage lets images be made, into Store, under the instance's id.
	CreateImage bool

	// What is captured, and for whom; a request says nothing of it.

	Store      string
	Volume     string
	Exclude    []string
	Recipients []string
	NoKernel   bool
}

// Codes of tasks that a machine refuses.
const (
	CodeNotPermitted = "Client.NotPermitted" // the machine's settings do not allow it
	CodeRequest      = "Client.InvalidRequest"
)

// refusal is a request that is not done, in words for who asked.
type refusal struct{ code, message string }

func (r *refusal) Error() string { return r.message }

func forbid(format string, a ...any) error {
	return &refusal{CodeNotPermitted, fmt.Sprintf(format, a...)}
}

func invalid(format string, a ...any) error {
	return &refusal{CodeRequest, fmt.Sprintf(format, a...)}
}

// Check reports rules that cannot be meant.
func (r *Rules) Check() error {
	for _, a := range r.Accounts {
		if !account.MatchString(a) {
			return fmt.Errorf("accounts: %q is no account: 12 digits, in quotes", a)
		}
	}
	for _, p := range r.BundleTo {
		if _, err := path.Match(p, ""); err != nil || !strings.Contains(p, "/") || strings.HasPrefix(p, "/") {
			return fmt.Errorf("bundle-to: %q is no pattern of BUCKET/PREFIX, as images/web-* or images/fleet/", p)
		}
		if all, ok := strings.CutSuffix(p, "/"); ok && strings.ContainsAny(all, `*?[\`) {
			return fmt.Errorf("bundle-to: %q: what ends in a slash is no pattern, but the beginning of what is allowed", p)
		}
	}
	if len(r.BundleTo) == 0 && !r.CreateImage {
		return errors.New("it allows nothing: give bundle-to, create-image, or both")
	}
	return nil
}

// Bounds of where a bundle goes. A bucket's name is no path, no URL and no option,
// whatever the store is; neither is a segment of the prefix.
var (
	account = regexp.MustCompile(`^[0-9]{12}$`)
	bucket  = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	segment = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	name    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
)

// maxPrefix bounds a bundle's prefix, in bytes.
const maxPrefix = 512

// Request makes of a catalog's request the one that the machine's agent is given,
// or says why there is none. The request's signature was verified.
func (r *Rules) Request(t *tasks.Request) (task.Request, error) {
	if len(r.Accounts) > 0 && !slices.Contains(r.Accounts, t.Account) {
		return task.Request{}, forbid("the machine takes no tasks of the account %s", clip(t.Account))
	}
	out := task.Request{Volume: r.Volume, Exclude: r.Exclude, ClientToken: "catalog:" + t.ID}
	switch t.Kind {
	case tasks.BundleInstance:
		folder, base := path.Split(t.Prefix)
		folder = strings.TrimSuffix(folder, "/")
		if !bucket.MatchString(t.Bucket) || strings.Contains(t.Bucket, "..") {
			return out, invalid("%s is no name of a bucket", clip(t.Bucket))
		}
		if len(t.Prefix) > maxPrefix || !name.MatchString(base) || folder != "" && slices.ContainsFunc(strings.Split(folder, "/"), func(s string) bool { return !segment.MatchString(s) }) {
			return out, invalid("%s is no prefix of a bundle: folders and a name of letters, digits and . _ -", clip(t.Prefix))
		}
		if !slices.ContainsFunc(r.BundleTo, func(p string) bool { return matches(p, t.Bucket+"/"+t.Prefix) }) {
			return out, forbid("the machine's settings do not let bundles go to %s", clip(t.Bucket+"/"+t.Prefix))
		}
		out.Kind, out.Name, out.Store = task.Bundle, base, t.Bucket
		if folder != "" {
			out.Store += "/" + folder
		}
	case tasks.CreateImage:
		if !r.CreateImage {
			return out, forbid("the machine's settings do not let images be made")
		}
		if t.Name != t.Instance {
			return out, forbid("an image made by a catalog's request is named after its instance, and not %s", clip(t.Name))
		}
		out.Kind, out.Name, out.Store, out.Recipients, out.NoKernel = task.CreateImage, t.Name, r.Store, r.Recipients, r.NoKernel
		out.Description = strings.Join(strings.Fields(t.Description), " ")
	default:
		return out, invalid("%s is nothing that this agent does", clip(string(t.Kind)))
	}
	if err := out.Check(); err != nil {
		return out, invalid("%v", err)
	}
	return out, nil
}

func matches(pattern, place string) bool {
	if strings.HasSuffix(pattern, "/") {
		return strings.HasPrefix(place, pattern)
	}
	ok, err := path.Match(pattern, place)
	return ok && err == nil
}

// clip quotes what others wrote, for a message.
func clip(s string) string { return fmt.Sprintf("%q", s[:min(len(s), 100)]) }
