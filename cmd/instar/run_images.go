package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/diff"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// digits is how much of a manifest's name is shown to people.
const digits = 12

func runImagesList(ctx context.Context, a *app, o *listOptions, args []string) error {
	s, err := a.browseImages(ctx, &o.imageStore)
	if err != nil {
		return err
	}
	defer s.Close()
	prefix := ""
	if len(args) > 0 {
		prefix = args[0]
	}
	registered := map[string]bool{} // versions that were shown
	if o.registered || o.query.asks() || !o.versions {
		only, err := a.listRegistered(ctx, o, s, prefix, registered)
		if err != nil || only {
			return err
		}
	}
	list, err := s.List(ctx, prefix)
	if err != nil {
		return err
	}
	doubtful := 0
	width := 0
	for _, l := range list {
		width = max(width, len(l.Image))
		if o.versions && len(l.Versions) > 1 {
			width = max(width, len(l.Image)+1+digits)
		}
	}
	for _, l := range list {
		if l.Err != nil {
			doubtful++
			if err := a.showListed(l, nil, width); err != nil {
				return err
			}
			if !o.versions {
				continue
			}
		}
		if l.Deleted && !o.versions {
			continue
		}
		if l.Deleted {
			if err := a.showListed(l, nil, width); err != nil {
				return err
			}
		}
		for _, v := range l.Versions {
			if !v.Newest && !o.versions || v.Err == nil && registered[l.Image+"@"+v.Name.String()] {
				continue
			}
			if v.Err != nil {
				doubtful++
			}
			if err := a.showListed(l, &v, width); err != nil {
				return err
			}
		}
	}
	if doubtful > 0 {
		return failf(exitTrust, "%d of the entries are not verified, as shown", doubtful)
	}
	return nil
}

// showListed prints a line of the list: a version, or what is to be said of the
// image as a whole. width is that of the longest name.
func (a *app) showListed(l images.Listed, v *images.Version, width int) error {
	f := ui.Fields{"image": l.Image, "sequence": l.Sequence, "deleted": l.Deleted}
	if v == nil {
		text := fmt.Sprintf("%-*s  deleted %s", width, l.Image, stamp(l.Changed))
		if l.Err != nil {
			text = fmt.Sprintf("%-*s  NOT VERIFIED: %v", width, l.Image, l.Err)
			f["error"] = l.Err.Error()
		}
		return a.ui.Result("image", text, f)
	}
	name := l.Image
	if !v.Newest {
		name += "@" + v.Name.String()[:digits]
	}
	f["manifest"], f["newest"], f["unpublished"], f["verified"] = v.Name.String(), v.Newest, v.Unpublished, v.Err == nil
	if v.Err != nil {
		f["error"] = v.Err.Error()
		return a.ui.Result("image", fmt.Sprintf("%-*s  NOT VERIFIED: %v", width, name, v.Err), f)
	}
	m := v.Manifest
	f["created"], f["architecture"], f["data"], f["added"], f["stored"], f["signer"], f["description"] = m.Created, m.Architecture, m.Data, m.Added, v.Stored(), v.Signer, m.Description
	text := fmt.Sprintf("%-*s  %s  %-6s  %9s data  %9s stored  %9s added", width, name, stamp(m.Created), m.Architecture, ui.Size(m.Data), ui.Size(v.Stored()), ui.Size(m.Added))
	if v.Unpublished {
		text += "  (not published)"
	}
	if !l.Expires.IsZero() && v.Newest {
		f["expires"] = l.Expires
	}
	if m.Description != "" {
		text += "  " + shown(m.Description)
	}
	return a.ui.Result("image", text, f)
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04Z") }

func runImagesShow(ctx context.Context, a *app, o *showOptions, ref string) error {
	s, err := a.browseImages(ctx, &o.imageStore)
	if err != nil {
		return err
	}
	defer s.Close()
	if done, err := a.showRegistered(ctx, o, s, ref); done || err != nil {
		return err
	}
	img, err := a.resolve(ctx, s, ref, &o.fresh)
	if err != nil {
		return err
	}
	if o.manifest {
		data, _, err := upload.GetBytes(ctx, s.Objects(), chunked.ManifestKey(img.Manifest.Name, img.Name), img.Size)
		if err != nil {
			return err
		}
		if chunked.NameOf(data) != img.Name {
			return failf(exitTrust, "the manifest of %s changed while it was read", ref)
		}
		_, err = a.stdout.Write(data)
		return err
	}
	return a.showOne(ctx, img)
}

func (a *app) showOne(ctx context.Context, img *images.Image) error {
	m := img.Manifest
	signer := keys.Fingerprint(img.Signer)
	f := ui.Fields{
		"image": m.Name, "manifest": img.Name.String(), "sequence": m.Sequence, "created": m.Created, "domain": m.Domain, "architecture": m.Architecture,
		"partition": m.Partition, "filesystem": m.Filesystem, "streams": m.Streams, "data": m.Data, "added": m.Added, "packs": len(m.Packs),
		"segments": len(m.Index.Segments), "signer": signer, "freshness": img.Freshness.String(), "tool": m.Tool, "description": m.Description,
		"root_device": m.RootDevice, "block_device_mapping": m.BlockDeviceMapping, "cmdline": m.Cmdline,
	}
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("image", "%s@%s, version %d", m.Name, img.Name.String()[:digits], m.Sequence)
	line("manifest", "%s", img.Name)
	if m.Description != "" {
		line("description", "%s", shown(m.Description))
	}
	line("created", "%s by %s", stamp(m.Created), shown(m.Tool))
	line("signed by", "%s", signer)
	line("freshness", "%s", img.Freshness)
	if m.Parent != (chunked.Name{}) {
		line("parent", "%s", m.Parent)
		f["parent"] = m.Parent.String()
	}
	line("machine", "%s, %s, partition table: %s", m.Architecture, m.Filesystem, m.Partition)
	if m.Cmdline != "" {
		line("cmdline", "%s", shown(m.Cmdline))
	}
	for _, s := range m.Streams {
		line(s.Name, "%s", ui.Size(s.Size))
	}
	line("data", "%s, %s of them added by this version", ui.Size(m.Data), ui.Size(m.Added))
	line("stored", "%d packs, %d index objects", len(m.Packs), len(m.Index.Segments)+1)
	recipients, err := img.Recipients(ctx)
	if err != nil {
		return err
	}
	list := make([]ui.Fields, 0, len(recipients))
	for _, r := range recipients {
		line("recipient", "%s", recipientText(r))
		list = append(list, ui.Fields{"recipient": r.Key, "comment": r.Comment})
	}
	f["recipients"] = list
	line("boot trace", "%s", a.traceText(ctx, img, f))
	return a.ui.Result("image", strings.TrimSuffix(b.String(), "\n"), f)
}

// layoutCache is the memory, in bytes, for reading a layout once in order.
const layoutCache = 4 << 20

// side opens an image to compare it.
func (a *app) side(ctx context.Context, img *images.Image) (diff.Side, error) {
	index, err := img.Open(ctx)
	if err != nil {
		return diff.Side{}, explainKeys(err)
	}
	layout, err := index.Stream(chunked.StreamLayout)
	if err != nil {
		if errors.Is(err, chunked.ErrMissing) {
			err = withHint(failf(exitFile, "image %s@%s has no list of its files", img.Manifest.Name, img.Name.String()[:digits]), "Only images made by create-image have; this one was imported.")
		}
		return diff.Side{}, err
	}
	s := diff.Side{Offset: disk.Kind(img.Manifest.Partition).Start()}
	if s.Layout, err = ext4.ReadLayout(io.NewSectionReader(layout.ReaderAt(ctx, layoutCache), 0, layout.Size())); err != nil {
		return diff.Side{}, err
	}
	s.Disk, err = index.Stream(chunked.StreamDisk)
	return s, err
}

func runImagesDiff(ctx context.Context, a *app, o *diffOptions, refA, refB string) error {
	s, err := a.readImages(ctx, &o.imageStore)
	if err != nil {
		return err
	}
	defer s.Close()
	var sides [2]diff.Side
	for i, ref := range []string{refA, refB} {
		img, err := a.resolve(ctx, s, ref, &o.fresh)
		if err != nil {
			return err
		}
		if sides[i], err = a.side(ctx, img); err != nil {
			return err
		}
	}
	counts := map[diff.Kind]int{}
	var total int64
	for d, err := range diff.Images(ctx, sides[0], sides[1]) {
		if err != nil {
			return err
		}
		counts[d.Kind]++
		total += d.Bytes
		if d.Kind == diff.Touched && !o.touched {
			continue
		}
		slash := ""
		if d.Mode&unix.S_IFMT == unix.S_IFDIR {
			slash = "/"
		}
		if err := a.ui.Result("difference", fmt.Sprintf("%-8s %12d  %s%s", d.Kind, d.Bytes, shown(d.Path), slash),
			ui.Fields{"path": d.Path, "kind": d.Kind, "bytes": d.Bytes, "size": d.Size, "was": d.Was}); err != nil {
			return err
		}
	}
	return a.ui.Result("total", fmt.Sprintf("%d added, %d removed, %d changed, %d touched: %s", counts[diff.Added], counts[diff.Removed], counts[diff.Changed], counts[diff.Touched], ui.Size(total)),
		ui.Fields{"added": counts[diff.Added], "removed": counts[diff.Removed], "changed": counts[diff.Changed], "touched": counts[diff.Touched], "bytes": total})
}

func runImagesForget(ctx context.Context, a *app, o *imageStore, names []string) error {
	for _, n := range names {
		if err := chunked.CheckImageName(n); err != nil {
			return usagef("%w", err)
		}
	}
	s, err := a.browseImages(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	ok, err := a.confirm(ctx, fmt.Sprintf("Forget what this machine has seen of %s in %s, and accept an older state?", strings.Join(names, ", "), s))
	if err != nil {
		return err
	}
	if !ok {
		return failf(exitPrompt, "nothing was forgotten")
	}
	for _, n := range names {
		if err := s.Forget(n); err != nil {
			return err
		}
		if err := a.ui.Result("forgotten", "Forgot what was seen of "+n, ui.Fields{"image": n, "store": s.String()}); err != nil {
			return err
		}
	}
	return nil
}

func runImagesDelete(ctx context.Context, a *app, o *deleteImageOptions, ref string) error {
	r, err := images.ParseRef(ref)
	if err != nil {
		return usagef("%w", err)
	}
	s, err := a.browseImages(ctx, &o.imageStore)
	if err != nil {
		return err
	}
	defer s.Close()
	signer, err := a.signer(ctx, &o.imageStore, o.sign)
	if err != nil {
		return err
	}
	question := fmt.Sprintf("Delete image %s with all its versions from %s?", ref, s)
	if r.Version != "" || r.Parents > 0 {
		question = fmt.Sprintf("Delete the version %s from %s?", ref, s)
	}
	ok, err := a.confirm(ctx, question)
	if err != nil {
		return err
	}
	if !ok {
		return failf(exitPrompt, "nothing was deleted")
	}
	d, err := s.Delete(ctx, ref, signer)
	if err != nil {
		return explainImage(err)
	}
	names := make([]string, len(d.Versions))
	for i, n := range d.Versions {
		names[i] = n.String()
	}
	f := ui.Fields{"image": d.Image, "versions": names, "sequence": d.Sequence}
	text := fmt.Sprintf("Deleted %s of %s; the image is no more", plural(len(names), "version"), d.Image)
	if d.Newest != (chunked.Name{}) {
		f["newest"] = d.Newest.String()
		text = fmt.Sprintf("Deleted %s of %s; the newest is %s@%s", plural(len(names), "version"), d.Image, d.Image, d.Newest.String()[:digits])
	}
	return a.ui.Result("deleted", text+"\n\"instar gc\" gives back the room", f)
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
