package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/catalog"
)

// call is in whose name something is done.
func (a *app) call(account string, signer keys.Signer) (catalog.Call, error) {
	c := catalog.Call{Account: strings.ReplaceAll(a.setting("account_id", "--account", account), "-", "")}
	if c.Account == "" {
		return c, withHint(usagef("missing option --account"), "account_id in the configuration, or EC2_USER_ID, is whose images are changed.")
	}
	if err := catalog.CheckAccount(c.Account); err != nil {
		return c, usagef("--account %q: an account has 12 digits", c.Account)
	}
	if signer != nil {
		c.By = keys.Fingerprint(signer.Public())
	}
	return c, nil
}

// changeCatalog opens the catalog for a change.
func (a *app) changeCatalog(ctx context.Context, o *catalogOptions) (*openedCatalog, catalog.Call, error) {
	k, err := a.openCatalog(ctx, &o.imageStore, o.sign, true)
	if err != nil {
		return nil, catalog.Call{}, err
	}
	call, err := a.call(o.account, k.signer)
	if err != nil {
		return nil, call, errors.Join(err, k.close())
	}
	return k, call, nil
}

// explainCatalog adds what to do.
func explainCatalog(err error) error {
	switch {
	case errors.Is(err, catalog.ErrNoCatalog):
		return withHint(&exitError{code: exitFile, err: err}, "\"instar catalog create REGION\" makes one.")
	case errors.Is(err, catalog.ErrRollback), errors.Is(err, catalog.ErrForked):
		return withHint(err, "The store shows an older catalog than this machine has seen: an older copy was put back, or somebody hides the newest.\nIf it was you who put an older copy back, \"instar catalog forget\" has it believed.")
	case errors.Is(err, keys.ErrUntrusted):
		return withHint(err, "A line in allowed_signers lets a key sign for the catalog: REGION namespaces=\"instar-catalog\" KEY, and each reader needs it.")
	}
	return err
}

// findImage finds a registered image by id, NAME or ACCOUNT/NAME. A plain name is
// one of the account's own: anybody may give an image of his the same, for whoever
// does not look whose it is.
func findImage(ctx context.Context, v *catalog.View, account, ref string) (*catalog.Image, error) {
	if strings.HasPrefix(ref, "ami-") || strings.HasPrefix(ref, "aki-") || strings.HasPrefix(ref, "ari-") {
		if catalog.CheckID(ref) == nil {
			m, err := v.Image(ctx, ref)
			if err == nil && m == nil {
				err = failf(exitFile, "there is no image %s", ref)
			}
			return m, err
		}
	}
	name := ref
	const whose = "Another account's image is named by its id, or ACCOUNT/NAME."
	if owner, rest, ok := strings.Cut(ref, "/"); ok && catalog.CheckAccount(owner) == nil {
		account, name = owner, rest
	}
	if account == "" {
		return nil, withHint(failf(exitFile, "no account is known whose image %s would be", shown(ref)),
			"account_id in the configuration, or EC2_USER_ID, says who you are. "+whose)
	}
	m, err := v.ByName(ctx, account, name)
	if err == nil && m == nil {
		err = withHint(failf(exitFile, "account %s has no image registered as %s", account, shown(name)), whose)
	}
	return m, err
}

// changeImage opens the catalog and makes a change to one image, in the name of
// its owner.
func (a *app) changeImage(ctx context.Context, o *catalogOptions, ref string, f func(k *openedCatalog, call catalog.Call, m *catalog.Image) error) (err error) {
	k, err := a.openCatalog(ctx, &o.imageStore, o.sign, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	v, err := k.View(ctx)
	if err != nil {
		return explainCatalog(err)
	}
	account := strings.ReplaceAll(a.setting("account_id", "--account", o.account), "-", "")
	m, err := findImage(ctx, v, account, ref)
	if err != nil {
		return err
	}
	if o.account != "" && m.Owner != account {
		return failf(exitUsage, "the image %s is account %s's", m.ID, m.Owner)
	}
	call := catalog.Call{Account: m.Owner, By: keys.Fingerprint(k.signer.Public())}
	return explainCatalog(f(k, call, m))
}

func (a *app) changed(m *catalog.Image, done, format string, args ...any) error {
	return a.ui.Result("changed", m.ID+" "+fmt.Sprintf(format, args...), ui.Fields{"image_id": m.ID, "name": m.Name, "change": done})
}

func tagsOf(l []string) (catalog.Tags, error) {
	t := catalog.Tags{}
	for _, s := range l {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, usagef("tag %q: write KEY=VALUE", s)
		}
		t[k] = v
	}
	return t, nil
}

func runImagesRegister(ctx context.Context, a *app, o *registerOptions, location string) (err error) {
	if err := need(o.name, "--name"); err != nil {
		return err
	}
	m := catalog.Image{
		Name: o.name, Description: o.description, Location: location, Architecture: o.arch, Kernel: o.kernel, Ramdisk: o.ramdisk,
		RootDeviceName: o.rootDevice, VirtualizationType: o.virtualization, Platform: o.platform, BootMode: o.bootMode,
		SourceImage: o.sourceImage, SourceInstance: o.sourceInstance,
	}
	tags, err := tagsOf(o.tags)
	if err != nil {
		return err
	}
	if len(tags) > 0 {
		m.Tags = tags
	}
	for _, b := range o.mappings {
		m.BlockDevices = append(m.BlockDevices, catalog.BlockDevice{Device: b.device, Virtual: b.virtual})
	}
	if err := o.read(&m); err != nil {
		return err
	}
	k, call, err := a.changeCatalog(ctx, &o.catalogOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	made, err := k.Register(ctx, call, catalog.Registration{Image: m, Token: o.token})
	if err != nil {
		return explainCatalog(err)
	}
	return a.ui.Result("registered", made.ID, recordFields(made))
}

// read reads the files that options name.
func (o *registerOptions) read(m *catalog.Image) error {
	small := func(name, option string, most int) ([]byte, error) {
		st, err := os.Stat(name)
		if err == nil && st.Size() > int64(most) {
			return nil, usagef("%s %s: %d bytes, more than %d", option, name, st.Size(), most)
		}
		var b []byte
		if err == nil {
			b, err = os.ReadFile(name)
		}
		if err != nil {
			return nil, failf(exitFile, "%s: %w", option, err)
		}
		return b, nil
	}
	if o.gettingStarted != "" {
		b, err := small(o.gettingStarted, "--getting-started", 64<<10)
		if err != nil {
			return err
		}
		m.GettingStarted = strings.ReplaceAll(string(b), "\r\n", "\n")
	}
	if o.parameters != "" {
		b, err := small(o.parameters, "--parameters", 1<<20)
		if err != nil {
			return err
		}
		if m.Parameters, err = readParameters(b); err != nil {
			return usagef("--parameters %s: %w", o.parameters, err)
		}
	}
	for i, l := range [][]string{o.inject, o.templates} {
		for _, s := range l {
			path, name, ok := strings.Cut(s, "=")
			if !ok {
				return usagef("--inject %q: write PATH=FILE", s)
			}
			b, err := small(name, "--inject", 64<<10)
			if err != nil {
				return err
			}
			st, err := os.Stat(name)
			if err != nil {
				return failf(exitFile, "--inject: %w", err)
			}
			m.Files = append(m.Files, catalog.File{Path: path, Mode: fmt.Sprintf("%04o", st.Mode().Perm()), Content: append([]byte{}, b...), Template: i == 1})
		}
	}
	return nil
}

// readParameters reads a YAML list of parameters.
func readParameters(b []byte) ([]catalog.Parameter, error) {
	var l []struct {
		Name     string   `yaml:"name"`
		Type     string   `yaml:"type"`
		Default  string   `yaml:"default"`
		Required bool     `yaml:"required"`
		Choices  []string `yaml:"choices"`
		Help     string   `yaml:"help"`
	}
	if err := yaml.Load(b, &l, yaml.WithKnownFields()); err != nil {
		return nil, err
	}
	var all []catalog.Parameter
	for _, p := range l {
		if p.Type == "" {
			p.Type = "string"
		}
		all = append(all, catalog.Parameter{Name: p.Name, Type: p.Type, Default: p.Default, Required: p.Required, Choices: p.Choices, Help: p.Help})
	}
	return all, nil
}

func runImagesTag(ctx context.Context, a *app, o *tagOptions, ref string, tags []string) error {
	put, err := tagsOf(tags)
	if err != nil {
		return err
	}
	if len(put) == 0 && len(o.remove) == 0 {
		return usagef("missing argument: KEY=VALUE, or --remove KEY")
	}
	return a.changeImage(ctx, &o.catalogOptions, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		if len(put) > 0 {
			if err := k.SetTags(ctx, call, []string{m.ID}, put); err != nil {
				return err
			}
		}
		if len(o.remove) > 0 {
			var which []catalog.TagMatch
			for _, key := range o.remove {
				which = append(which, catalog.TagMatch{Key: key})
			}
			if err := k.DeleteTags(ctx, call, []string{m.ID}, which); err != nil {
				return err
			}
		}
		return a.changed(m, "tagged", "is tagged")
	})
}

func runImagesShare(ctx context.Context, a *app, o *shareOptions, ref string) error {
	if len(o.with) == 0 && len(o.withdraw) == 0 && !o.public && !o.private && !o.reset {
		return usagef("nothing to do: --with, --withdraw, --public, --private or --reset")
	}
	if o.public && o.private || o.reset && (len(o.with) > 0 || len(o.withdraw) > 0 || o.public || o.private) {
		return usagef("--public and --private exclude each other, and --reset all others")
	}
	return a.changeImage(ctx, &o.catalogOptions, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		add := catalog.Permissions{Public: o.public, Accounts: o.with}
		remove := catalog.Permissions{Public: o.private, Accounts: o.withdraw}
		if o.reset {
			remove = catalog.Permissions{Public: true, Accounts: m.LaunchAccounts, Orgs: m.LaunchOrgs, OrgUnits: m.LaunchOrgUnits}
		}
		s, err := k.Share(ctx, call, m.ID, add, remove, o.flag)
		if err != nil {
			if s != nil && len(s.Keyless) > 0 {
				return withHint(err, "\"instar accounts set %s --key FILE\" notes one; --flag-only shares without.", s.Keyless[0])
			}
			return explainKeys(err)
		}
		n := s.Image
		if len(s.Removed) > 0 || len(o.withdraw) > 0 || o.reset {
			a.ui.Say("note: what an account has read, or opened, before cannot be taken back: it may have kept a copy")
		}
		if s.KeyKept {
			a.ui.Say("note: the last key the image is wrapped for stays: without it nobody could open it")
		}
		if o.public && m.Kind == catalog.KindInstar {
			a.ui.Say("note: everybody may launch it now, but the image opens only for its recipients' keys")
		}
		return a.ui.Result("shared", m.ID+" may be launched by "+permissionText(n), ui.Fields{
			"image_id": m.ID, "public": n.Public, "accounts": n.LaunchAccounts, "keys_added": s.Wrapped, "keys_removed": s.Removed,
		})
	})
}

func permissionText(m *catalog.Image) string {
	who := []string{"its owner " + m.Owner}
	if m.Public {
		who = append(who, "everybody")
	}
	return strings.Join(slices.Concat(who, m.LaunchAccounts, m.LaunchOrgs, m.LaunchOrgUnits), ", ")
}

func runImagesCopy(ctx context.Context, a *app, o *copyOptions, ref string) (err error) {
	if err := need(o.to, "--to"); err != nil {
		return err
	}
	k, err := a.openCatalog(ctx, &o.imageStore, o.sign, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	v, err := k.View(ctx)
	if err != nil {
		return explainCatalog(err)
	}
	call, err := a.call(o.account, k.signer)
	if err != nil {
		return err
	}
	m, err := findImage(ctx, v, call.Account, ref)
	if err != nil {
		return err
	}
	there, err := a.otherRegion(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, there.close()) }()
	if _, err := there.View(ctx); err != nil {
		return explainCatalog(err)
	}
	if r := there.Region(); o.toRegion != "" && r != o.toRegion {
		return failf(exitUsage, "--to-region %s: the catalog of %s is of region %s", o.toRegion, there.Catalog, r)
	}
	token := o.token
	if token == "" {
		token = copyToken(v.Region(), m.ID, there.Region(), o.name)
	}
	n, err := there.Copy(ctx, call, catalog.CopyRequest{
		Name: o.name, Description: o.description, SourceID: m.ID, SourceRegion: v.Region(), Token: token, CopyTags: o.copyTags, Folder: o.folder,
	}, k.Catalog)
	if err != nil {
		return explainCatalog(err)
	}
	if n.State == catalog.Pending {
		a.ui.Say("%s in %s is pending: copying", n.ID, there.Region())
	}
	bar := a.progress("copying " + m.ID)
	n, err = there.CompleteCopy(ctx, call, n.ID, k.Catalog, bar.to)
	bar.end()
	if err != nil {
		return explainCatalog(err)
	}
	f := recordFields(n)
	f["region"] = there.Region()
	return a.ui.Result("copied", n.ID, f)
}

// otherRegion opens the catalog that is copied to: the same options, but for
// those that begin with --to.
func (a *app) otherRegion(ctx context.Context, o *copyOptions) (*openedCatalog, error) {
	b := *a
	b.conf = a.conf.Clone()
	st := o.imageStore
	st.bucket = o.to
	for _, s := range []struct {
		option *string
		value  string
	}{{&st.url, o.toURL}, {&st.caCert, o.toCACert}} {
		if s.value != "" {
			*s.option = s.value
		}
	}
	if o.toAccessKey != "" || o.toSecretFile != "" {
		st.accessKey, st.secretKeyFile = o.toAccessKey, o.toSecretFile
	}
	return b.openCatalog(ctx, &st, o.sign, true)
}

// copyToken is the same for the same copy.
func copyToken(words ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(words, "\x00")))
	return "copy-" + hex.EncodeToString(sum[:16])
}

func runImagesDeprecate(ctx context.Context, a *app, o *deprecateOptions, ref string) error {
	at := time.Now()
	switch {
	case o.never && o.at != "":
		return usagef("--at and --never exclude each other")
	case o.never:
		at = time.Time{}
	case o.at != "":
		t, err := time.Parse(time.RFC3339, o.at)
		if err != nil {
			span, serr := parseSpan(o.at)
			if serr != nil {
				return usagef("--at %q: neither a time as 2027-01-15T08:00:00Z nor a span as 30d", o.at)
			}
			t = at.Add(span)
		}
		at = t
	}
	return a.changeImage(ctx, &o.catalogOptions, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		if err := k.SetDeprecation(ctx, call, m.ID, at); err != nil {
			return err
		}
		if o.never {
			return a.changed(m, "deprecation", "is not deprecated")
		}
		return a.changed(m, "deprecation", "is deprecated from %s on", stamp(at))
	})
}

func runImagesProtect(ctx context.Context, a *app, o *protectOptions, ref string) error {
	if o.off && o.cooldown {
		return usagef("--off and --cooldown exclude each other")
	}
	return a.changeImage(ctx, &o.catalogOptions, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		text, err := k.SetProtection(ctx, call, m.ID, !o.off, o.cooldown)
		if err != nil {
			return err
		}
		return a.changed(m, "protection", "deregistration protection: %s", text)
	})
}

func runImagesDisable(ctx context.Context, a *app, o *catalogOptions, ref string) error {
	return a.changeImage(ctx, o, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		if err := k.SetEnabled(ctx, call, m.ID, false); err != nil {
			return err
		}
		return a.changed(m, "disabled", "is disabled")
	})
}

func runImagesEnable(ctx context.Context, a *app, o *catalogOptions, ref string) error {
	return a.changeImage(ctx, o, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		if err := k.SetEnabled(ctx, call, m.ID, true); err != nil {
			return err
		}
		return a.changed(m, "enabled", "is enabled")
	})
}

func runImagesDeregister(ctx context.Context, a *app, o *catalogOptions, ref string) error {
	return a.changeImage(ctx, o, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		ok, err := a.confirm(ctx, fmt.Sprintf("Deregister image %s (%s)? Its id is never used again.", m.ID, m.Name))
		if err != nil {
			return err
		}
		if !ok {
			return failf(exitPrompt, "nothing was deregistered")
		}
		if err := k.Deregister(ctx, call, m.ID); err != nil {
			return err
		}
		return a.changed(m, "deregistered", "is deregistered; what lies at %s stays until it is deleted", shown(m.Location))
	})
}

func runKeysCreate(ctx context.Context, a *app, o *keysOptions, name string) (err error) {
	tags, err := tagsOf(o.tags)
	if err != nil {
		return err
	}
	if o.out != "" {
		if _, err := os.Lstat(o.out); err == nil {
			return failf(exitFile, "--out: %w: %s", fs.ErrExist, o.out)
		}
	} else if a.json {
		return usagef("--json needs --out FILE: a private key is no field of a message")
	}
	k, call, err := a.changeCatalog(ctx, &o.catalogOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	pair, private, err := k.CreateKeyPair(ctx, call, name, o.kind, tags)
	if err != nil {
		return explainCatalog(err)
	}
	if o.out == "" {
		if _, err := a.stdout.Write(private); err != nil {
			return err
		}
		a.ui.Say("made %s (%s): the private key is shown this once", pair.Name, pair.ID)
		return nil
	}
	if err := writeSecret(o.out, private); err != nil {
		_, derr := k.DeleteKeyPair(ctx, call, pair.Name, "")
		return errors.Join(failf(exitFile, "writing the private key: %w", err), derr)
	}
	return a.ui.Result("key_pair", pairText(pair), pairFields(pair))
}

// writeSecret writes a new file that nobody else can read, whole or not at all.
func writeSecret(name string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".instar-key-*") // 0600 from the first byte
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), name); err != nil { // never over a file that exists
		return err
	}
	d, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func pairText(k *catalog.KeyPair) string {
	return fmt.Sprintf("%s  %s  %s  %s", k.ID, k.Type, k.Fingerprint, k.Name)
}

func pairFields(k *catalog.KeyPair) ui.Fields {
	return ui.Fields{"key_pair_id": k.ID, "name": k.Name, "type": k.Type, "fingerprint": k.Fingerprint, "public_key": k.PublicKey, "created": k.Created, "tags": k.Tags}
}

func runKeysImport(ctx context.Context, a *app, o *keysOptions, name, file string) (err error) {
	tags, err := tagsOf(o.tags)
	if err != nil {
		return err
	}
	if err := isFile(file, "the public key"); err != nil {
		return err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return failf(exitFile, "reading the public key: %w", err)
	}
	k, call, err := a.changeCatalog(ctx, &o.catalogOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	pair, err := k.ImportKeyPair(ctx, call, name, data, tags)
	if err != nil {
		return explainCatalog(err)
	}
	return a.ui.Result("key_pair", pairText(pair), pairFields(pair))
}

func runKeysList(ctx context.Context, a *app, o *keysOptions, names []string) (err error) {
	call, err := a.call(o.account, nil)
	if err != nil {
		return err
	}
	k, err := a.openCatalog(ctx, &o.imageStore, "", false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	v, err := k.View(ctx)
	if err != nil {
		return explainCatalog(err)
	}
	missing := slices.Clone(names)
	for pair, err := range v.KeyPairs(ctx, call.Account) {
		if err != nil {
			return err
		}
		if len(names) > 0 && !slices.Contains(names, pair.Name) {
			continue
		}
		missing = slices.DeleteFunc(missing, func(n string) bool { return n == pair.Name })
		if err := a.ui.Result("key_pair", pairText(pair), pairFields(pair)); err != nil {
			return err
		}
	}
	if len(missing) > 0 {
		return failf(exitFile, "there is no key pair %s", shown(strings.Join(missing, ", ")))
	}
	return nil
}

func runKeysDelete(ctx context.Context, a *app, o *keysOptions, names []string) (err error) {
	k, call, err := a.changeCatalog(ctx, &o.catalogOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	for _, n := range names {
		gone, err := k.DeleteKeyPair(ctx, call, n, "")
		if err != nil {
			return explainCatalog(err)
		}
		text, f := "there was no key pair "+shown(n), ui.Fields{"name": n, "deleted": gone != nil}
		if gone != nil {
			text, f["key_pair_id"] = "deleted "+gone.ID+" "+n, gone.ID
		}
		if err := a.ui.Result("deleted", text, f); err != nil {
			return err
		}
	}
	return nil
}

func runAccountsSet(ctx context.Context, a *app, o *accountsOptions, id string) (err error) {
	acc := catalog.Account{ID: strings.ReplaceAll(id, "-", ""), Alias: o.alias}
	if catalog.CheckAccount(acc.ID) != nil {
		return usagef("account %q: it has 12 digits", id)
	}
	if len(o.keys) > 0 {
		l, err := a.recipientsOf(o.keys)
		if err != nil {
			return err
		}
		for _, r := range l {
			acc.Recipients = append(acc.Recipients, r.String())
		}
	}
	k, err := a.openCatalog(ctx, &o.imageStore, o.sign, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	if err := k.SetAccount(ctx, acc); err != nil {
		return explainCatalog(err)
	}
	return a.showAccount(&acc)
}

func (a *app) showAccount(acc *catalog.Account) error {
	text := acc.ID
	if acc.Alias != "" {
		text += "  " + acc.Alias
	}
	return a.ui.Result("account", fmt.Sprintf("%s  %s", text, plural(len(acc.Recipients), "key")), ui.Fields{"account": acc.ID, "alias": acc.Alias, "recipients": acc.Recipients})
}

func runAccountsList(ctx context.Context, a *app, o *accountsOptions) (err error) {
	k, err := a.openCatalog(ctx, &o.imageStore, "", false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	v, err := k.View(ctx)
	if err != nil {
		return explainCatalog(err)
	}
	for acc, err := range v.Accounts(ctx) {
		if err != nil {
			return err
		}
		if err := a.showAccount(acc); err != nil {
			return err
		}
	}
	return nil
}

func runAccountsRemove(ctx context.Context, a *app, o *accountsOptions, id string) (err error) {
	k, err := a.openCatalog(ctx, &o.imageStore, o.sign, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	was, err := k.RemoveAccount(ctx, strings.ReplaceAll(id, "-", ""))
	if err != nil {
		return explainCatalog(err)
	}
	text := "forgot what was noted of " + shown(id)
	if !was {
		text = "nothing was noted of " + shown(id)
	}
	return a.ui.Result("removed", text, ui.Fields{"account": id, "was": was})
}

func runCatalogShow(ctx context.Context, a *app, o *imageStore) (err error) {
	k, err := a.openCatalog(ctx, o, "", false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	return a.showCatalog(ctx, k)
}

func (a *app) showCatalog(ctx context.Context, k *openedCatalog) error {
	var v *catalog.View
	states := map[catalog.State]int{}
	accounts := 0
	err := k.Read(ctx, func(now *catalog.View) error {
		v, accounts = now, 0
		clear(states)
		for m, err := range v.Images(ctx) {
			if err != nil {
				return err
			}
			states[m.State]++
		}
		for _, err := range v.Accounts(ctx) {
			if err != nil {
				return err
			}
			accounts++
		}
		return nil
	})
	if err != nil {
		return explainCatalog(err)
	}
	text := fmt.Sprintf("region       %s\nchange       %d, %s\nsigned by    %s\nimages       %d available, %d pending, %d disabled, %d failed, %d deregistered\naccounts     %d noted",
		v.Region(), v.Sequence(), stamp(v.Changed()), v.Signer(), states[catalog.Available], states[catalog.Pending], states[catalog.Disabled],
		states[catalog.Failed], states[catalog.Deregistered], accounts)
	return a.ui.Result("catalog", text, ui.Fields{
		"region": v.Region(), "sequence": v.Sequence(), "changed": v.Changed(), "signer": v.Signer(), "root": v.Root().String(), "images": states, "accounts": accounts,
	})
}

func runCatalogGC(ctx context.Context, a *app, o *imageStore, sign string, dry bool) (err error) {
	k, err := a.openCatalog(ctx, o, sign, !dry)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	r, err := k.Collect(ctx, dry)
	if err != nil {
		return explainCatalog(err)
	}
	word := "deleted"
	if dry {
		word = "would delete"
	}
	return a.ui.Result("collected", fmt.Sprintf("%s %s, %s", word, plural(r.Objects, "object"), ui.Size(r.Bytes)), ui.Fields{"objects": r.Objects, "bytes": r.Bytes, "tokens": r.Tokens, "dry_run": dry})
}

func runCatalogForget(ctx context.Context, a *app, o *imageStore) (err error) {
	k, err := a.openCatalog(ctx, o, "", false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	ok, err := a.confirm(ctx, fmt.Sprintf("Forget what this machine has seen of the catalog of %s, and accept an older state?", k.Catalog))
	if err != nil {
		return err
	}
	if !ok {
		return failf(exitPrompt, "nothing was forgotten")
	}
	if err := k.Forget(); err != nil {
		return err
	}
	return a.ui.Result("forgotten", "Forgot what was seen of the catalog", ui.Fields{"store": k.Catalog.String()})
}
