package orders

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// TestHostile: what is not allowed is refused and told in the store; what is not
// the server's word is told here alone; nothing reaches the agent.
func TestHostile(t *testing.T) {
	with := func(f func(*tasks.Request)) tasks.Request {
		r := bundle
		f(&r)
		return r
	}
	for name, c := range map[string]struct {
		r    tasks.Request
		code string
	}{
		"another bucket":       {with(func(r *tasks.Request) { r.Bucket = "other" }), CodeNotPermitted},
		"another prefix":       {with(func(r *tasks.Request) { r.Prefix = "db-1" }), CodeNotPermitted},
		"a folder more":        {with(func(r *tasks.Request) { r.Prefix = "web-1/x" }), CodeNotPermitted},
		"upwards":              {with(func(r *tasks.Request) { r.Prefix = "web-1/../../etc" }), CodeRequest},
		"absolute":             {with(func(r *tasks.Request) { r.Prefix = "/etc/web-1" }), CodeRequest},
		"no name":              {with(func(r *tasks.Request) { r.Prefix = "web-1/" }), CodeRequest},
		"an option":            {with(func(r *tasks.Request) { r.Prefix = "--volume=x" }), CodeRequest},
		"a line break":         {with(func(r *tasks.Request) { r.Prefix = "web-1\nx" }), CodeRequest},
		"long":                 {with(func(r *tasks.Request) { r.Prefix = "web-" + strings.Repeat("x", 20000) }), CodeRequest},
		"a bucket that is up":  {with(func(r *tasks.Request) { r.Bucket = ".." }), CodeRequest},
		"a bucket with dots":   {with(func(r *tasks.Request) { r.Bucket = "a..b" }), CodeRequest},
		"a URL":                {with(func(r *tasks.Request) { r.Bucket = "file:" }), CodeRequest},
		"another's name":       {tasks.Request{Kind: tasks.CreateImage, Instance: "i-1", ImageID: "ami-1", Name: "db"}, CodeNotPermitted},
		"another account":      {with(func(r *tasks.Request) { r.Account = "999999999999" }), CodeNotPermitted},
		"words without an end": {with(func(r *tasks.Request) { r.Bucket, r.Prefix = "backup", "i-1/"+strings.Repeat("a/", 300)+"w" }), CodeRequest},
	} {
		w := newWorld(t)
		w.rules.Accounts = []string{"111122223333"}
		if c.r.Account == "" {
			c.r.Account = "111122223333"
		}
		asked := w.submit(c.r)
		w.now = w.now.Add(time.Second)
		good := w.submit(bundle)
		w.steps(w.taker(w.queue(w.store), w.agent), 2)
		if s := w.status(asked); s.State != tasks.Failed || s.Code != c.code || s.Message == "" {
			t.Errorf("%s: %+v, want %s", name, s, c.code)
		}
		if s := w.status(good); s.State != tasks.Bundling || w.agent.count() != 1 {
			t.Errorf("%s: the request after it is %+v", name, s)
		}
	}

	w := newWorld(t)
	other, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	stranger := tasks.Open(tasks.Options{Store: w.store, Signer: other, Now: w.clock})
	strange, err := stranger.Submit(t.Context(), bundle)
	if err != nil {
		t.Fatal(err)
	}
	changed, huge, moved := w.submit(bundle), w.submit(bundle), w.submit(tasks.Request{Kind: tasks.BundleInstance, Instance: "i-2", Bucket: "images", Prefix: "web-1"})
	w.put(changed, "request", strings.Replace(w.get(changed, "request"), `"web-1"`, `"web-2"`, 1))
	w.put(huge, "request", strings.Repeat("x", 1<<20))
	here := moved
	here.Instance = "i-1"
	w.put(here, "request", w.get(moved, "request"))
	w.put(here, "status", w.get(moved, "status"))
	w.steps(w.taker(w.queue(w.store), w.agent), 3)
	if w.agent.count() != 0 {
		t.Errorf("the agent has %d tasks", w.agent.count())
	}
	if len(w.events) != 4 { // each once, however often it is looked
		t.Errorf("told was %v", w.events)
	}
	for _, x := range []tasks.Task{strange, changed, huge, moved, here} {
		if s := w.get(x, "status"); !strings.Contains(s, `"pending"`) {
			t.Errorf("the status of what nobody signed was changed: %s", s)
		}
	}
}

// TestRulesAreChecked: what lets nothing, or cannot be meant, is told at once.
func TestRulesAreChecked(t *testing.T) {
	for _, r := range []Rules{
		{},
		{BundleTo: []string{"images"}},
		{BundleTo: []string{"/images/x"}},
		{BundleTo: []string{"images/[x"}},
		{BundleTo: []string{"images/*/"}},
		{CreateImage: true, Accounts: []string{"me"}},
	} {
		if r.Check() == nil {
			t.Errorf("%+v is taken", r)
		}
	}
}

// FuzzBundle: wherever a bundle is let go to, it is a place that the rules allow, by
// a plain name of a bucket and a path that goes only down.
func FuzzBundle(f *testing.F) {
	for _, s := range [][2]string{{"images", "web-1"}, {"backup", "i-1/a/b"}, {"..", "web-1"}, {"images", "../web-1"}, {"backup", "i-1//x"}, {"file:", "/x"}, {"images", "web-1\x00"}} {
		f.Add(s[0], s[1])
	}
	rules := Rules{BundleTo: []string{"images/web-*", "backup/i-1/", "*/any"}, Volume: "/srv"}
	f.Fuzz(func(t *testing.T, to, prefix string) {
		r, err := rules.Request(&tasks.Request{Kind: tasks.BundleInstance, ID: "bun-00000000000000000", Instance: "i-1", Bucket: to, Prefix: prefix})
		if err != nil {
			return
		}
		place := r.Store + "/" + r.Name
		if place != to+"/"+prefix || upload.CheckKey(place) != nil || strings.ContainsAny(place, ":\\\x00\n ") || strings.HasPrefix(place, "-") || strings.HasPrefix(place, ".") {
			t.Errorf("%q and %q give %q", to, prefix, place)
		}
		if b, p, err := upload.SplitLocation(r.Store); err != nil || b != to || p+"/"+r.Name != prefix && r.Name != prefix {
			t.Errorf("%q is read as %q and %q: %v", r.Store, b, p, err)
		}
		if !strings.HasPrefix(place, "images/web-") && !strings.HasPrefix(place, "backup/i-1/") && strings.Count(place, "/") != 1 {
			t.Errorf("%q is allowed", place)
		}
		if r.Volume != "/srv" || r.Kind != task.Bundle || r.Replace {
			t.Errorf("%+v", r)
		}
	})
}
