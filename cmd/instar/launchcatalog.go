package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/term"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/images"
)

// registered finds what is to be launched in the catalog, if ref is an id or a
// name there and no image of the store is called so; nil if it is not. What it
// stands for is then what is launched. key pairs are looked up with it.
func (o *launchOptions) registered(ctx context.Context, a *app) (m *catalog.Image, err error) {
	ref := o.image
	id := catalog.CheckID(ref) == nil
	if o.store == "" && a.conf.Get("store").Text == "" {
		if id || len(o.keyPairs) > 0 {
			return nil, usagef("missing option --store: which catalog?")
		}
		return nil, nil
	}
	if ref == "" && len(o.keyPairs) == 0 {
		return nil, nil
	}
	k, err := a.openCatalog(ctx, o.images(), "", false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	v, err := k.View(ctx)
	if errors.Is(err, catalog.ErrNoCatalog) && !id && len(o.keyPairs) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, explainCatalog(err)
	}
	account := strings.ReplaceAll(a.conf.Get("account_id").Text, "-", "")
	for _, name := range o.keyPairs {
		pair, err := v.KeyPair(ctx, account, name)
		if err != nil {
			return nil, err
		}
		if pair == nil {
			return nil, withHint(failf(exitFile, "account %q has no key pair %s", account, shown(name)), "\"instar keys list\" shows them; account_id in the configuration says whose.")
		}
		o.pairs = append(o.pairs, metadata.PublicKey{Name: pair.Name, Key: pair.PublicKey + " " + pair.Name})
	}
	if ref == "" || !id && a.isStored(ctx, k.store, ref) {
		return nil, nil
	}
	if m, err = findImage(ctx, v, account, ref); err != nil {
		if _, unfit := images.ParseRef(ref); !id && unfit == nil && exitCode(err) == exitFile {
			return nil, nil // said as ever
		}
		return nil, err
	}
	who := account
	if who == "" {
		who = m.Owner
	}
	if !m.Launchable(who) {
		return nil, failf(exitUsage, "image %s is %s, and account %s may not launch it now", m.ID, m.State, who)
	}
	a.ui.Say("%s is %s, %s", shown(ref), m.ID, shown(m.Location))
	o.image = ""
	switch m.Kind {
	case catalog.KindInstar:
		o.image = m.Location
	case catalog.KindBundle:
		if o.download.digest = m.Digest; m.Digest == "" {
			return nil, failf(exitTrust, "image %s: the catalog does not say which manifest was registered", m.ID)
		}
		return m, o.nameStored(m.Location)
	default:
		return nil, failf(exitUsage, "image %s is a record without bytes: there is nothing to launch", m.ID)
	}
	return m, nil
}

// isStored says whether an image of the store is called ref.
func (a *app) isStored(ctx context.Context, objects upload.Store, ref string) bool {
	image, _, _ := strings.Cut(ref, "@")
	if chunked.CheckImageName(image) != nil {
		return false
	}
	_, err := objects.Stat(ctx, chunked.HeadKey(image))
	return err == nil || !errors.Is(err, upload.ErrNotExist)
}

// arguments gives the image's parameters their values: those of --parameter,
// defaults, and what is answered when it asks for the others.
func (o *launchOptions) arguments(a *app, m *catalog.Image, own []byte) ([]byte, error) {
	given := map[string]string{}
	for _, s := range o.parameters {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return nil, usagef("--parameter %q: write NAME=VALUE", s)
		}
		given[name] = value
	}
	if m == nil {
		if len(given) > 0 {
			return nil, usagef("--parameter is for a registered image, which says what it wants to know")
		}
		return own, nil
	}
	values, missing, err := m.Arguments(given)
	if err != nil {
		return nil, usagef("%w", err)
	}
	in := bufio.NewReader(a.stdin)
	for _, p := range missing {
		v, err := o.ask(a, in, p)
		if err != nil {
			return nil, err
		}
		values[p.Name] = v
	}
	data, err := m.UserData(values, own, metadata.MaxUserData)
	if err != nil {
		return nil, failf(exitUsage, "--user-data: %w", err)
	}
	return data, nil
}

// ask asks for a parameter that has no value; what is secret is not shown.
func (o *launchOptions) ask(a *app, in *bufio.Reader, p catalog.Parameter) (string, error) {
	if a.batch {
		return "", withHint(failf(exitPrompt, "the image wants to know %s", p.Name), "Give it by --parameter %s=VALUE: %s", p.Name, shown(p.Help))
	}
	for range 3 {
		about := p.Name
		if p.Help != "" {
			about += " (" + shown(p.Help) + ")"
		}
		if len(p.Choices) > 0 {
			about += " [" + strings.Join(p.Choices, ", ") + "]"
		}
		fmt.Fprintf(a.stderr, "%s: ", about)
		var v string
		f, isFile := a.stdin.(*os.File)
		if p.Type == "secret" && isFile && term.IsTerminal(int(f.Fd())) {
			b, err := term.ReadPassword(int(f.Fd()))
			fmt.Fprintln(a.stderr)
			if err != nil {
				return "", err
			}
			v = string(b)
		} else {
			line, err := in.ReadString('\n')
			if err != nil && line == "" {
				fmt.Fprintln(a.stderr)
				return "", withHint(failf(exitPrompt, "nobody answers what %s is to be", p.Name), "--parameter %s=VALUE says it.", p.Name)
			}
			v = strings.TrimRight(line, "\r\n")
		}
		err := p.Check(v)
		if err == nil {
			return v, nil
		}
		a.ui.Say("%v", err)
	}
	return "", failf(exitPrompt, "no value for %s that fits", p.Name)
}

// ancestry tells the instance what it is made of.
func ancestry(in *metadata.Instance, m *catalog.Image) {
	if m == nil {
		return
	}
	in.AMI = m.ID
	in.AMIManifest = m.Location
	in.Kernel, in.Ramdisk = m.Kernel, m.Ramdisk
	if m.SourceImage != "" {
		in.AncestorAMIs = []string{m.SourceImage}
	}
	for _, p := range m.ProductCodes {
		if !slices.Contains(in.ProductCodes, p.Code) {
			in.ProductCodes = append(in.ProductCodes, p.Code)
		}
	}
}
