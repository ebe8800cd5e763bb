package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
)

// catalogQuery are the options that say which registered images are listed.
type catalogQuery struct {
	account, region                                   string
	owners, executableBy, filters, tags               []string
	architectures, platforms, rootDeviceTypes, states []string
	deprecated                                        bool
}

func (q *catalogQuery) add(cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	f.text(&q.account, "account", "", "list what `ACCOUNT` may see; without it everything", ofUs, test)
	f.text(&q.region, "of-region", "", "the catalog must be of region `NAME`", ofUs, test)
	f.list(&q.owners, "owner", "", "of `ACCOUNT` only, by number or alias; may be repeated", ofUs, test)
	f.list(&q.executableBy, "executable-by", "", "that `ACCOUNT` was given permission to launch; all is everybody; may be repeated", ofUs, test)
	f.list(&q.architectures, "architecture", "", "of `ARCH` only: x86_64, arm64, i386; may be repeated", ofUs, test)
	f.list(&q.platforms, "platform", "", "of platform `NAME` only; linux is what has none; may be repeated", ofUs, test)
	f.list(&q.rootDeviceTypes, "root-device-type", "", "of `TYPE` only: instance-store, ebs; may be repeated", ofUs, test)
	f.list(&q.states, "state", "", "in `STATE` only: available, pending, failed, disabled, deregistered; may be repeated", ofUs, test)
	f.list(&q.tags, "tag", "", "tagged `KEY` or KEY=VALUE; may be repeated", ofUs, test)
	f.list(&q.filters, "filter", "", "that EC2's filter `NAME=VALUE` finds; may be repeated", ofUs, test)
	f.yes(&q.deprecated, "deprecated", "", "deprecated ones too", ofUs, test)
}

// asks tells whether anything is said that only registered images have.
func (q *catalogQuery) asks() bool {
	return q.account != "" || q.region != "" || q.deprecated ||
		len(q.owners)+len(q.executableBy)+len(q.filters)+len(q.tags)+len(q.architectures)+len(q.platforms)+len(q.rootDeviceTypes)+len(q.states) > 0
}

// compile makes filters of the options. linux is told apart here: no filter of
// EC2's finds what an image has not.
func (q *catalogQuery) compile() (l []catalog.Filter, platforms func(string) bool, err error) {
	values := func(name string, v []string) {
		if len(v) > 0 {
			l = append(l, catalog.Filter{Name: name, Values: v})
		}
	}
	values("architecture", q.architectures)
	values("root-device-type", q.rootDeviceTypes)
	values("state", q.states)
	for _, t := range q.tags {
		k, v, ok := strings.Cut(t, "=")
		if ok {
			values("tag:"+k, []string{v})
		} else {
			values("tag-key", []string{k})
		}
	}
	byName := map[string][]string{}
	var order []string
	for _, f := range q.filters {
		name, v, ok := strings.Cut(f, "=")
		if !ok {
			return nil, nil, usagef("--filter %q: write NAME=VALUE", f)
		}
		if byName[name] == nil {
			order = append(order, name)
		}
		byName[name] = append(byName[name], v)
	}
	for _, n := range order {
		values(n, byName[n])
	}
	return l, func(p string) bool {
		return len(q.platforms) == 0 || slices.Contains(q.platforms, p) || p == "" && slices.Contains(q.platforms, "linux")
	}, nil
}

// listRegistered lists the registered images of the store's catalog, and marks
// the Instar images among them. only says that nothing else is asked for.
func (a *app) listRegistered(ctx context.Context, o *listOptions, s *openedStore, prefix string, marked map[string]bool) (only bool, err error) {
	only = o.registered || o.query.asks()
	if only && o.versions {
		return only, usagef("--versions is about the images of the store, not about registered ones")
	}
	filters, platform, err := o.query.compile()
	if err != nil {
		return only, err
	}
	if _, err := catalog.ParseFilters(filters); err != nil {
		return only, usagef("%w", err)
	}
	account := strings.ReplaceAll(o.query.account, "-", "")
	if account != "" && catalog.CheckAccount(account) != nil {
		return only, usagef("--account %q: an account has 12 digits", o.query.account)
	}
	k, err := a.openCatalog(ctx, &o.imageStore, "", false)
	if err != nil {
		return only, err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	v, err := k.View(ctx)
	if errors.Is(err, catalog.ErrNoCatalog) && !only {
		return only, nil
	}
	if err != nil {
		return only, explainCatalog(err)
	}
	if r := o.query.region; r != "" && v.Region() != r {
		return only, failf(exitFile, "the catalog of %s is of region %s, not of %s", k.Catalog, v.Region(), r)
	}
	q := catalog.Query{Owners: o.query.owners, ExecutableBy: o.query.executableBy, Filters: filters, IncludeDeprecated: o.query.deprecated, IncludeDisabled: true}
	var found []*catalog.Image
	if account != "" {
		found, err = v.Describe(ctx, account, q)
	} else {
		found, err = v.All(ctx, q)
	}
	if err != nil {
		return only, err
	}
	found = slices.DeleteFunc(found, func(m *catalog.Image) bool {
		return !strings.HasPrefix(m.Name, prefix) || !platform(m.Platform) || m.State == catalog.Deregistered && !slices.Contains(o.query.states, "deregistered")
	})
	width := 0
	for _, m := range found {
		width = max(width, len(m.Name))
	}
	for _, m := range found {
		if m.Kind == catalog.KindInstar && m.State != catalog.Deregistered {
			marked[m.Location] = true
		}
		text := fmt.Sprintf("%s  %-*s  %-12s  %s  %-6s  %s", m.ID, width, m.Name, m.State, stamp(m.Created), m.Architecture, m.Owner)
		switch {
		case m.Public:
			text += "  public"
		case len(m.LaunchAccounts) > 0:
			text += fmt.Sprintf("  shared with %d", len(m.LaunchAccounts))
		}
		if m.IsDeprecated(time.Now()) {
			text += "  deprecated"
		}
		if m.Description != "" {
			text += "  " + shown(m.Description)
		}
		if err := a.ui.Result("registered", text, recordFields(m)); err != nil {
			return only, err
		}
	}
	return only, nil
}

// recordFields are a record for programs.
func recordFields(m *catalog.Image) ui.Fields {
	f := ui.Fields{
		"image_id": m.ID, "name": m.Name, "state": m.State, "owner": m.Owner, "created": m.Created, "kind": m.Kind, "location": m.Location,
		"architecture": m.Architecture, "type": m.Type, "platform": m.Platform, "root_device_type": m.RootDeviceType, "root_device_name": m.RootDeviceName,
		"virtualization_type": m.VirtualizationType, "description": m.Description, "public": m.Public, "accounts": m.LaunchAccounts, "tags": m.Tags,
		"digest": m.Digest, "size": m.Size, "stored": m.Stored, "revision": m.Revision, "protection": m.Protection,
	}
	for name, v := range map[string]string{
		"kernel": m.Kernel, "ramdisk": m.Ramdisk, "boot_mode": m.BootMode, "source_image": m.SourceImage, "source_region": m.SourceRegion,
		"source_instance": m.SourceInstance, "signer": m.Signer, "reason": m.Reason.Message, "getting_started": m.GettingStarted,
	} {
		if v != "" {
			f[name] = v
		}
	}
	if !m.Deprecated.IsZero() {
		f["deprecated"] = m.Deprecated
	}
	if len(m.BlockDevices) > 0 {
		f["block_devices"] = m.BlockDevices
	}
	if len(m.Parameters) > 0 {
		f["parameters"] = m.Parameters
	}
	if len(m.Files) > 0 {
		var l []string
		for _, x := range m.Files {
			l = append(l, x.Path)
		}
		f["files"] = l
	}
	return f
}

// showRegistered shows a registered image if ref is an id, or a name that no
// image of the store has.
func (a *app) showRegistered(ctx context.Context, o *showOptions, s *openedStore, ref string) (done bool, err error) {
	id := catalog.CheckID(ref) == nil
	if !id {
		if image, _, _ := strings.Cut(ref, "@"); chunked.CheckImageName(image) == nil {
			if _, err := s.Objects().Stat(ctx, chunked.HeadKey(image)); err == nil || !errors.Is(err, upload.ErrNotExist) {
				return false, nil // an image of the store, or nothing can be said
			}
		}
	}
	k, err := a.openCatalog(ctx, &o.imageStore, "", false)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	v, err := k.View(ctx)
	if errors.Is(err, catalog.ErrNoCatalog) && !id {
		return false, nil
	}
	if err != nil {
		return true, explainCatalog(err)
	}
	m, err := findImage(ctx, v, strings.ReplaceAll(a.conf.Get("account_id").Text, "-", ""), ref)
	if err != nil {
		if !id && exitCode(err) == exitFile && chunked.CheckImageName(ref) == nil {
			return false, nil // said as ever
		}
		return true, err
	}
	if o.manifest {
		return true, usagef("--manifest is for images of the store: %s is registered at %s", m.ID, m.Location)
	}
	return true, a.showRecord(m)
}

func (a *app) showRecord(m *catalog.Image) error {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		if strings.TrimSpace(text) != "" {
			fmt.Fprintf(&b, "%-12s %s\n", name, text)
		}
	}
	line("id", "%s", m.ID)
	line("name", "%s", m.Name)
	line("state", "%s", m.State)
	line("reason", "%s", shown(m.Reason.Message))
	line("description", "%s", shown(m.Description))
	line("registered", "%s for %s", stamp(m.Created), m.Owner)
	line("location", "%s", shown(m.Location))
	line("manifest", "%s", m.Digest)
	line("signed by", "%s", m.Signer)
	root := m.RootDeviceType
	if m.RootDeviceName != "" {
		root += " on " + m.RootDeviceName
	}
	line("machine", "%s, %s, %s, root %s", m.Architecture, m.Type, m.VirtualizationType, root)
	line("kernel", "%s", strings.TrimSpace(m.Kernel+" "+m.Ramdisk))
	line("size", "%s, %s stored", ui.Size(m.Size), ui.Size(m.Stored))
	for _, d := range m.BlockDevices {
		line("device", "%s %s", d.Device, d.Virtual)
	}
	line("made from", "%s", strings.TrimSpace(m.SourceRegion+" "+m.SourceImage+" "+m.SourceInstance))
	line("launched by", "%s", permissionText(m))
	if !m.Deprecated.IsZero() {
		line("deprecated", "%s", stamp(m.Deprecated))
	}
	if t := m.ProtectionText(time.Now()); t != "disabled" {
		line("protection", "%s", t)
	}
	for _, k := range m.Tags.Sorted() {
		line("tag", "%s=%s", shown(k), shown(m.Tags[k]))
	}
	for _, p := range m.Parameters {
		text := p.Name + ", " + p.Type
		if p.Required {
			text += ", required"
		}
		if p.Default != "" {
			text += ", default " + shown(p.Default)
		}
		line("parameter", "%s: %s", text, shown(p.Help))
	}
	for _, f := range m.Files {
		line("file", "%s, %s", shown(f.Path), ui.Size(int64(len(f.Content))))
	}
	for _, c := range m.History {
		line("history", "%s %s %s %s", stamp(c.Time), c.Action, c.Account, shown(c.Detail))
	}
	if m.GettingStarted != "" {
		b.WriteString("\n")
		for l := range strings.SplitSeq(strings.TrimRight(m.GettingStarted, "\n"), "\n") {
			b.WriteString("  " + strings.ReplaceAll(l, "\t", "    ") + "\n")
		}
	}
	f := recordFields(m)
	f["history"] = m.History
	return a.ui.Result("registered", strings.TrimSuffix(b.String(), "\n"), f)
}

// guard keeps what the store's catalog has registered from being deleted.
func (a *app) guard(o *imageStore, objects upload.Store, trust *keys.AllowedSigners) func(context.Context, string, []chunked.Name) (func(context.Context) error, error) {
	return func(ctx context.Context, image string, versions []chunked.Name) (func(context.Context) error, error) {
		// Without a key it is looked, and not claimed.
		signer, _ := a.machineKeys(o, "", false).Signer(ctx)
		k, err := catalog.Open(objects, catalog.Options{Trust: trust, Signer: signer, State: a.stateDir()})
		if err != nil {
			return nil, err
		}
		release, err := k.Guard(ctx, image, versions)
		if errors.Is(err, keys.ErrUntrusted) {
			err = explainCatalog(err)
		}
		return release, err
	}
}

// registered are the Instar images that garbage collection keeps. Whoever has
// no allowed_signers file cannot ask a catalog, and deletes nothing that a head
// of the store lists.
func (a *app) registered(ctx context.Context, o *imageStore, objects upload.Store) (func(string, chunked.Name) bool, error) {
	trust, err := a.machineKeys(o, "", false).Signers(nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	k, err := catalog.Open(objects, catalog.Options{Trust: trust, State: a.stateDir()})
	if err != nil {
		return nil, err
	}
	f, err := k.Registered(ctx)
	return f, explainCatalog(err)
}

// claimBundle makes sure that no registered image is the bundle about to be
// deleted, and that none becomes it: in the catalog of the configured store, and
// in one at the root of the bundle's bucket. release ends that.
func (a *app) claimBundle(ctx context.Context, o *storage, bundles upload.Store, manifest string) (release func() error, err error) {
	var done []func() error
	release = func() error {
		var errs []error
		for _, f := range done {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	m := a.machineKeys(&imageStore{}, "", false)
	trust, err := m.Signers(nil)
	if errors.Is(err, fs.ErrNotExist) {
		return release, nil // no catalog was ever believed here
	}
	if err != nil {
		return release, err
	}
	signer, _ := m.Signer(ctx)
	try := func(objects upload.Store, location string) error {
		k, err := catalog.Open(objects, catalog.Options{Trust: trust, Signer: signer, State: a.stateDir()})
		var ended func(context.Context) error
		if err == nil {
			ended, err = k.Claim(ctx, "delete-bundle", location)
		}
		if err != nil {
			return errors.Join(explainCatalog(err), objects.Close())
		}
		done = append(done, func() error {
			return errors.Join(ended(context.WithoutCancel(ctx)), objects.Close())
		})
		return nil
	}
	for _, c := range a.catalogsBeside(bundles.String(), manifest) {
		objects, err := a.openBucket(ctx, o, c.store, false)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, upload.ErrNoBucket) {
			continue
		}
		if err == nil {
			err = try(objects, c.location)
		}
		if err != nil {
			return release, errors.Join(err, release())
		}
	}
	return release, nil
}

// beside is a place where a catalog may be, and how a bundle is called there.
type beside struct{ store, location string }

// catalogsBeside are the places where a catalog may have a bundle registered:
// the one that is configured, and those at or above the bundle in its bucket.
func (a *app) catalogsBeside(bundles, manifest string) []beside {
	var l []beside
	add := func(b beside) {
		if !slices.Contains(l, b) {
			l = append(l, b)
		}
	}
	configured := a.conf.Get("catalog").Text
	place, isBucket := strings.CutPrefix(bundles, "s3://")
	if !isBucket {
		dir := strings.TrimPrefix(bundles, "file://")
		base := func(catalogDir string) string {
			local := strings.TrimPrefix(a.conf.Get("endpoint").Text, "file://")
			if filepath.IsAbs(local) {
				return filepath.Clean(local)
			}
			return filepath.Dir(catalogDir)
		}
		at := func(catalogDir string) {
			if rel, err := filepath.Rel(base(catalogDir), filepath.Join(dir, manifest)); err == nil && !strings.HasPrefix(rel, "..") {
				add(beside{"file://" + catalogDir, filepath.ToSlash(rel)})
			}
		}
		if url, err := imageStoreURL(configured); err == nil && strings.HasPrefix(url, "file://") {
			at(strings.TrimPrefix(url, "file://"))
		}
		// Directories that are buckets' or in them, and no higher.
		for top := base(dir); len(dir) > len(top); dir = filepath.Dir(dir) {
			at(dir)
		}
		return l
	}
	location := path.Join(place, manifest)
	if configured != "" && !strings.HasPrefix(configured, "/") && !strings.HasPrefix(configured, ".") && !strings.HasPrefix(configured, "file://") {
		add(beside{configured, location})
	}
	for place != "." && place != "" {
		add(beside{"s3://" + place, location})
		place = path.Dir(place)
	}
	return l
}
