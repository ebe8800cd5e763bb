package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/images"
)

// defaultDomain is the domain of images for which none is named.
const defaultDomain = "default"

func runCreateImage(ctx context.Context, a *app, o *createImageOptions) error {
	limitGarbage(0)
	begun := time.Now()
	plan, err := a.volumePlan(&o.volumeOptions, o.arch)
	if err != nil {
		return err
	}
	// What lives during the walk is the tree; two million files are not to have
	// as much garbage beside them.
	plan.Root.Report = func(p rootfs.Progress) { limitGarbage(int64(p.Files) * treeMemory) }
	m := a.machineKeys(&o.imageStore, o.sign, !o.dryRun)
	plan.Root.Never = append(plan.Root.Never, m.SecretFiles()...)
	if f := a.setting("secret_key_file", "--secret-key-file", o.secretKeyFile); f != "" && f != "-" {
		plan.Root.Never = append(plan.Root.Never, f)
	}
	if dir := a.imageStoreDir(&o.imageStore); dir != "" {
		plan.Root.Never = append(plan.Root.Never, dir)
	}
	if o.dryRun {
		return a.dryRun(ctx, plan)
	}
	io, err := a.imageOptions(ctx, o)
	if err != nil {
		return err
	}
	io.Volume = *plan
	objects, err := a.openImages(ctx, &o.imageStore, true)
	if err != nil {
		return err
	}
	defer objects.Close()
	if err := a.imageKeys(ctx, o, m, io); err != nil {
		return err
	}
	so := images.Options{State: a.stateDir(), Trust: io.Trust, Identities: io.Identities}
	if io.Store, err = images.Open(objects, so); err != nil {
		return err
	}
	init, done, err := findInit()
	switch {
	case o.init != "":
		io.Boot.Init = o.init
	case err == nil:
		defer done()
		io.Boot.Init = init
	case exitCode(err) != exitFile: // there is none
		return err
	}
	io.Planned = limitMemory
	r := &reporter{ui: a.ui}
	defer r.end()
	res, err := capture.CreateImage(ctx, io.ImageOptions, r)
	r.end()
	if err != nil {
		return explainCapture(err, m, io.Domain)
	}
	if err := a.showImage(res, io.Store.String(), time.Since(begun)); err != nil {
		return err
	}
	return a.afterImage(res)
}

// treeMemory is about what a file takes until it is planned, in bytes.
const treeMemory = 250

// limitMemory makes the collector hold a capture to what its plan takes now,
// the writer's buffers with a quarter of room to gather garbage in, and what the
// index of data bytes needs: about 100 bytes for each half MiB. A limit that
// what lives comes near to would have it collect all the time. GOMEMLIMIT in the
// environment has the last word.
func limitMemory(data int64) {
	buffers := int64(120+10*runtime.GOMAXPROCS(0)) << 20 // each core has a piece in hand
	limitGarbage(buffers)
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	runtime.GC() // the plan is to be counted, not what its making left
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	debug.SetMemoryLimit(int64(m.HeapAlloc) + buffers + data>>19*100)
}

// imageSettings are what a capture is asked for, and the keys it reads with.
type imageSettings struct {
	capture.ImageOptions
	Trust      *keys.AllowedSigners
	Identities []*keys.Identity
}

// imageOptions makes the capture's options of the command's, as far as no key
// and no store are needed for that.
func (a *app) imageOptions(ctx context.Context, o *createImageOptions) (*imageSettings, error) {
	if err := need(o.name, "--name"); err != nil {
		return nil, err
	}
	if err := chunked.CheckImageName(o.name); err != nil {
		return nil, usagef("--name: %w", err)
	}
	s := &imageSettings{ImageOptions: capture.ImageOptions{
		Name: o.name, Domain: a.setting("domain", "--domain", o.domain), Description: o.description, AllCreators: o.dedup == "domain",
		VerifyContent: o.verifyContent, Full: o.full, BootTrace: o.bootTrace, Tool: "instar " + version,
		Boot: capture.BootOptions{NoKernel: o.noKernel, Kernel: o.kernel},
	}}
	if s.Domain == "" {
		s.Domain = defaultDomain
	}
	if err := chunked.CheckDomainName(s.Domain); err != nil {
		return nil, usagef("--domain: %w", err)
	}
	if len(o.description) > 255 {
		return nil, usagef("--description: %d bytes, at most 255 can be", len(o.description))
	}
	switch o.compression {
	case "fastest":
		s.Level = capture.LevelOf(chunked.Fastest)
	case "default":
		s.Level = capture.LevelOf(chunked.Default)
	case "better":
		s.Level = capture.LevelOf(chunked.Better)
	}
	for _, m := range o.mappings {
		s.Mappings = append(s.Mappings, chunked.Mapping{Virtual: m.virtual, Device: m.device})
	}
	var err error
	if s.Expires, err = parseSpan(o.expires); err != nil {
		return nil, usagef("--expires: %w", err)
	}
	if o.arch != "" {
		if s.Architecture, err = a.arch(ctx, o.arch); err != nil {
			return nil, err
		}
		switch s.Architecture {
		case "x86_64", "arm64", "i386":
		default:
			return nil, usagef("--arch %s: images are x86_64, arm64 or i386", o.arch)
		}
	}
	if o.init != "" {
		return s, isFile(o.init, "--init")
	}
	return s, nil
}

// imageKeys reads this machine's keys and the recipients', and tells what was made.
func (a *app) imageKeys(ctx context.Context, o *createImageOptions, m *machine.Machine, s *imageSettings) (err error) {
	defer a.showMade(m)
	defer func() {
		if errors.Is(err, machine.ErrLost) {
			err = withHint(err, "Put it back from a copy: a new key opens none of the images there are. To begin anew all the same, remove the file of its public half, which ends in .pub.")
		}
	}()
	if s.Identities, err = m.Identities(); err != nil {
		return err
	}
	owner, err := m.Owner()
	if err != nil {
		return err
	}
	s.Owner = owner
	if s.Signer, err = m.Signer(ctx); err != nil {
		return err
	}
	if s.Trust, err = m.Signers(s.Signer); err != nil {
		return err
	}
	if err := a.checkSigner(m, s.Trust, s.Signer.Public(), map[string]string{chunked.NamespaceImage: s.Name, chunked.NamespaceHead: s.Name}); err != nil {
		return err
	}
	s.Recipients = []*keys.Recipient{s.Identities[0].Recipient()}
	named := o.recipients
	if len(named) == 0 {
		var l list
		if err := l.Set(a.conf.Get("recipients").Text); err != nil {
			return err
		}
		named = l
	}
	for _, n := range named {
		rs, err := recipients(n, a.getenv("HOME"))
		if err != nil {
			return err
		}
		for _, r := range rs {
			if !contains(s.Recipients, r) {
				s.Recipients = append(s.Recipients, r)
			}
		}
	}
	return nil
}

func contains(rs []*keys.Recipient, r *keys.Recipient) bool {
	for _, x := range rs {
		if x.String() == r.String() {
			return true
		}
	}
	return false
}

// recipients reads a recipient, or a file of them.
func recipients(s, home string) ([]*keys.Recipient, error) {
	r, err := keys.ParseRecipient(s)
	if err == nil {
		return []*keys.Recipient{r}, nil
	}
	if strings.HasPrefix(s, "age1") || strings.HasPrefix(s, "ssh-") && strings.Contains(s, " ") || strings.HasPrefix(s, "ecdsa-") {
		return nil, usagef("--recipient: %w", err)
	}
	if slices.Contains([]string{"ssh-ed25519", "ssh-rsa", "ssh-dss"}, s) && isFile(s, "--recipient") != nil {
		return nil, usagef("--recipient: %s is the first word of an SSH public key only: put all of it into quotes, '%s AAAA...', or name its file", s, s)
	}
	if rest, ok := strings.CutPrefix(s, "~/"); ok && home != "" {
		s = home + "/" + rest
	}
	return keys.ReadRecipients(s)
}

// parseSpan reads a duration with a unit: minutes, hours, days or weeks.
func parseSpan(s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	units := map[byte]time.Duration{'m': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour, 'w': 7 * 24 * time.Hour}
	unit, ok := units[s[len(s)-1]]
	n, err := strconv.ParseInt(s[:len(s)-1], 10, 32)
	if !ok || err != nil || n <= 0 || n > int64(100*365*24*time.Hour/unit) {
		return 0, fmt.Errorf("%q is no span of time: give a number with m, h, d or w behind it, as 12h or 7d", s)
	}
	return time.Duration(n) * unit, nil
}

// showImage tells what was published.
func (a *app) showImage(r *capture.ImageResult, store string, took time.Duration) error {
	text := fmt.Sprintf("Image %s@%s is in %s\n%s read, %s added in %d packs and %d index objects, %s of data taken from what was stored; %d of %d files unchanged; %.1f s",
		r.Manifest.Name, r.Published.Name.String()[:12], store, ui.Size(r.BytesRead), ui.Size(r.BytesAdded), r.PacksAdded, r.IndexAdded, ui.Size(r.BytesReused),
		r.FilesUnchanged, r.Files, took.Seconds())
	f := ui.Fields{
		"store": store, "name": r.Manifest.Name, "manifest": r.Published.Name.String(), "sequence": r.Published.Sequence, "domain": r.Manifest.Domain,
		"size": r.Size, "data": r.Manifest.Data, "files": r.Files, "files_unchanged": r.FilesUnchanged, "files_read": r.FilesRead,
		"bytes_read": r.BytesRead, "bytes_added": r.BytesAdded, "bytes_reused": r.BytesReused, "bytes_traced": r.Traced, "packs_added": r.PacksAdded, "index_added": r.IndexAdded,
		"packs": len(r.Manifest.Packs), "objects": len(r.Manifest.Packs) + len(r.Manifest.Index.Segments) + 3, "kernel": r.Kernel, "seconds": took.Seconds(),
	}
	if r.Parent != nil {
		f["parent"] = r.Parent.String()
	}
	return a.ui.Result("image", text, f)
}

// afterImage makes the exit status of files that changed.
func (a *app) afterImage(r *capture.ImageResult) error {
	if r.Flawed == 0 {
		return nil
	}
	return failf(exitChanged, "done, but %d files changed, could not be read or cannot be in the image as they are; they are named above", r.Flawed)
}
