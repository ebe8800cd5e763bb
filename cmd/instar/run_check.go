package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/instar-image/instar/agent/diff"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/images"
)

// verifyImages checks images of a store, or with --scrub the store.
func verifyImages(ctx context.Context, a *app, o *verifyOptions, refs []string) error {
	st := imageStore{storage: o.storage, identities: o.identities, signers: o.signers}
	st.bucket = o.store
	if o.scrub {
		return scrubStore(ctx, a, o, &st, refs)
	}
	if len(refs) == 0 {
		refs = nil // all
	}
	for _, ref := range refs {
		if _, err := images.ParseRef(ref); err != nil {
			return usagef("%w", err)
		}
	}
	s, err := a.readImages(ctx, &st)
	if err != nil {
		return err
	}
	defer s.Close()
	count := a.progress("verifying " + s.String())
	rep, err := s.Verify(ctx, images.VerifyOptions{Refs: refs, ReadData: o.readData, Progress: count.to})
	count.end()
	if err != nil {
		return explainImage(err)
	}
	bad, closed := 0, 0
	for _, v := range rep.Images {
		if len(v.Damages) > 0 {
			bad++
		}
		if !v.Opened {
			closed++
		}
		if err := a.showVerified(ctx, s, v); err != nil {
			return err
		}
	}
	for _, d := range rep.Stray {
		if err := a.ui.Result("damage", "of no version: "+d.String(), ui.Fields{"key": d.Key, "error": d.Err.Error()}); err != nil {
			return err
		}
	}
	text := fmt.Sprintf("%s, %d of them damaged; %d objects, %s, looked for", plural(len(rep.Images), "version"), bad, rep.Objects.Objects, ui.Size(rep.Objects.Bytes))
	if o.readData {
		text += fmt.Sprintf("; %s of data read and checked", ui.Size(rep.Read))
	} else {
		text += "; the data was not read: --read-data does"
	}
	if closed > 0 {
		text += fmt.Sprintf("\n%s not opened by this machine's keys: of them only the objects were looked for", plural(closed, "version"))
	}
	err = a.ui.Result("verified", text, ui.Fields{"ok": rep.Sound(), "versions": len(rep.Images), "damaged": bad, "unopened": closed, "objects": rep.Objects, "read": rep.Read})
	if err == nil && !rep.Sound() {
		err = withHint(failf(exitTrust, "not all is good, as reported"), "\"instar repair\" may bring back what another place still has.")
	}
	return err
}

// showVerified tells what is wrong with a version: objects, ranges, files.
func (a *app) showVerified(ctx context.Context, s *openedStore, v images.Verified) error {
	name := v.Image
	if v.Name != (chunked.Name{}) {
		name += "@" + v.Name.String()[:digits]
	}
	f := ui.Fields{"image": v.Image, "manifest": v.Name.String(), "newest": v.Newest, "opened": v.Opened, "ok": len(v.Damages) == 0}
	if len(v.Damages) == 0 {
		return a.ui.Result("version", name+"  good", f)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s  DAMAGED", name)
	var damages []ui.Fields
	for _, d := range v.Damages {
		fmt.Fprintf(&b, "\n  object  %s", d)
		damages = append(damages, ui.Fields{"key": d.Key, "error": d.Err.Error(), "ranges": d.Ranges})
		for _, r := range d.Ranges {
			fmt.Fprintf(&b, "\n  lost    %s, bytes %d to %d", r.Stream, r.From, r.To-1)
		}
	}
	f["damages"] = damages
	names, rest, err := a.hurtFiles(ctx, s, v)
	switch {
	case ctx.Err() != nil:
		return err
	case err != nil:
		fmt.Fprintf(&b, "\n  which files are hurt cannot be told: %v", err)
	default:
		f["files"], f["other_bytes"] = names, rest
		for i, n := range names {
			if i == shownFiles {
				fmt.Fprintf(&b, "\n  and %d more files: --json has all", len(names)-i)
				break
			}
			fmt.Fprintf(&b, "\n  file    %s", shown(n))
		}
		if rest > 0 {
			fmt.Fprintf(&b, "\n  besides %s that no file's data are: the filesystem's own", ui.Size(rest))
		}
	}
	return a.ui.Result("version", b.String(), f)
}

// shownFiles is how many hurt files of a version are named to people.
const shownFiles = 50

// hurtFiles names the files that the damaged ranges of a version's disk are of.
func (a *app) hurtFiles(ctx context.Context, s *openedStore, v images.Verified) (names []string, rest int64, err error) {
	var spans []diff.Span
	for _, d := range v.Damages {
		for _, r := range d.Ranges {
			if r.Stream == chunked.StreamDisk {
				spans = append(spans, diff.Span{From: r.From, To: r.To})
			}
		}
	}
	if len(spans) == 0 {
		if !v.Opened {
			err = errors.New("no key of this machine opens it")
		}
		return nil, 0, err
	}
	img, err := s.Resolve(ctx, v.Image+"@"+v.Name.String(), images.ResolveOptions{})
	if err != nil {
		return nil, 0, err
	}
	side, err := a.side(ctx, img)
	if err != nil {
		return nil, 0, err
	}
	names, rest = diff.Hurt(side.Layout, side.Offset, merged(spans))
	return names, rest, nil
}

// merged joins spans that overlap: two objects may lack the same bytes.
func merged(spans []diff.Span) []diff.Span {
	slices.SortFunc(spans, func(a, b diff.Span) int { return cmp.Compare(a.From, b.From) })
	var out []diff.Span
	for _, s := range spans {
		if n := len(out); n > 0 && s.From <= out[n-1].To {
			out[n-1].To = max(out[n-1].To, s.To)
			continue
		}
		out = append(out, s)
	}
	return out
}

// counter shows how much of a total, known later, is done.
type counter struct {
	bar  *ui.Progress
	mu   sync.Mutex
	done int64
}

func (a *app) progress(name string) *counter {
	return &counter{bar: a.ui.Progress(name, 0)}
}

func (c *counter) to(done, _ int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if done > c.done {
		c.bar.Add(done - c.done)
		c.done = done
	}
}

func (c *counter) end() { c.bar.End() }

// scrubStore reads every object of a store, with no key.
func scrubStore(ctx context.Context, a *app, o *verifyOptions, st *imageStore, refs []string) error {
	switch {
	case len(refs) > 0:
		return usagef("--scrub is about the whole store: it takes no IMAGE")
	case o.readData:
		return usagef("--scrub reads everything; --read-data is for images")
	case len(o.identities) > 0:
		return usagef("--scrub needs no --identity: it opens nothing")
	}
	so := images.Options{State: a.stateDir()}
	var err error
	if so.Trust, err = a.machineKeys(st, "", false).Signers(nil); err != nil && (o.signers != "" || !errors.Is(err, fs.ErrNotExist)) {
		return err
	}
	objects, err := a.openImages(ctx, st, false)
	if err != nil {
		return err
	}
	defer objects.Close()
	s, err := images.Open(objects, so)
	if err != nil {
		return err
	}
	count := a.progress("scrubbing " + s.String())
	rep, err := s.Scrub(ctx, count.to)
	count.end()
	if err != nil {
		return err
	}
	for _, d := range rep.Damages {
		if err := a.ui.Result("damage", "damaged  "+d.String(), ui.Fields{"key": d.Key, "error": d.Err.Error()}); err != nil {
			return err
		}
	}
	hurt := slices.Sorted(maps.Keys(rep.Hurt))
	for _, ref := range hurt {
		if err := a.ui.Result("hurt", fmt.Sprintf("hurt     %s by %s", ref, plural(len(rep.Hurt[ref]), "damage")), ui.Fields{"version": ref, "keys": rep.Hurt[ref]}); err != nil {
			return err
		}
	}
	text := fmt.Sprintf("%d objects, %s, read; %d damaged, %s hurt", rep.Objects.Objects, ui.Size(rep.Objects.Bytes), len(rep.Damages), plural(len(hurt), "version"))
	if so.Trust == nil {
		text += "\nsignatures were not checked: --signers FILE says whose to believe"
	}
	err = a.ui.Result("scrubbed", text, ui.Fields{"ok": len(rep.Damages) == 0, "objects": rep.Objects, "damaged": len(rep.Damages), "hurt": len(hurt), "signatures": so.Trust != nil})
	if err == nil && len(rep.Damages) > 0 {
		err = withHint(failf(exitTrust, "%d objects are damaged, as reported", len(rep.Damages)), "\"instar verify IMAGE --read-data\" tells which files are hurt; \"instar repair\" may bring them back.")
	}
	return err
}

func runRepair(ctx context.Context, a *app, o *repairOptions) error {
	s, err := a.readImages(ctx, &o.imageStore)
	if err != nil {
		return err
	}
	defer s.Close()
	ro := images.RepairOptions{}
	m := a.machineKeys(&o.imageStore, "", false)
	for _, from := range o.from {
		other := o.imageStore
		other.bucket = from
		x, err := a.readImages(ctx, &other)
		if err != nil {
			return fmt.Errorf("--from %s: %w", from, err)
		}
		defer x.Close()
		ro.Stores = append(ro.Stores, x.Store)
	}
	for _, path := range o.disks {
		f, err := os.Open(path)
		if err != nil {
			return failf(exitFile, "--disk: %w", err)
		}
		defer f.Close()
		ro.Candidates = append(ro.Candidates, images.Disk{ReaderAt: f})
	}
	domain := a.setting("domain", "--domain", o.domain)
	if domain == "" {
		domain = defaultDomain
	}
	if ro.Domain, err = s.Domain(ctx, domain, images.DomainOptions{}); err != nil {
		if ctx.Err() != nil || o.domain != "" {
			return err
		}
		a.ui.Say("note: only whole objects can be put back: %v", err)
	} else {
		owner, err := m.Owner()
		if err != nil {
			return err
		}
		ro.Owner = chunked.Key(owner)
	}
	count := a.progress("repairing " + s.String())
	rep, err := s.Repair(ctx, ro)
	count.end()
	if rep != nil && len(rep.Damages) > 0 {
		if serr := a.showRepair(ctx, s, rep); serr != nil {
			return errors.Join(err, serr)
		}
	}
	if err != nil {
		return err
	}
	if len(rep.Damages) == 0 {
		return a.ui.Result("repaired", "Nothing is damaged", ui.Fields{"ok": true, "damages": 0})
	}
	if len(rep.Lost)+len(rep.Unopened) > 0 {
		return withHint(failf(exitTrust, "not all could be brought back, as reported"), "--from STORE names another store, --disk FILE a raw copy of a disk, that may have it.")
	}
	return nil
}

func (a *app) showRepair(ctx context.Context, s *openedStore, rep *images.RepairReport) error {
	for _, d := range rep.Damages {
		if err := a.ui.Result("damage", "damaged  "+d.String(), ui.Fields{"key": d.Key, "error": d.Err.Error()}); err != nil {
			return err
		}
	}
	for _, v := range rep.Lost {
		if err := a.showVerified(ctx, s, v); err != nil {
			return err
		}
	}
	var b strings.Builder
	chunks, saved := 0, 0
	for _, m := range rep.Moved {
		chunks, saved = chunks+m.Chunks, saved+m.Saved
	}
	fmt.Fprintf(&b, "%d damaged; %s put back whole; of %s %d of %d pieces in use saved; %d set aside in quarantine/",
		len(rep.Damages), plural(len(rep.Restored), "object"), plural(len(rep.Moved), "pack"), saved, chunks, len(rep.Quarantined))
	if n := len(rep.Lost); n > 0 {
		fmt.Fprintf(&b, "\n%s still not whole", plural(n, "version"))
	}
	for _, ref := range rep.Unopened {
		fmt.Fprintf(&b, "\n%s is hurt, and no key of this machine opens it", ref)
	}
	return a.ui.Result("repaired", b.String(), ui.Fields{
		"ok": len(rep.Lost)+len(rep.Unopened) == 0, "damages": len(rep.Damages), "restored": rep.Restored, "pieces": chunks, "saved": saved,
		"quarantined": rep.Quarantined, "unopened": rep.Unopened, "lost": len(rep.Lost),
	})
}
