package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/instar-image/instar/upload/catalog"
)

func runImagesRegister(ctx context.Context, a *app, o *registerOptions, location string) error {
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
	return a.inAccount(ctx, &o.catalogOptions, func(k *openedCatalog, call catalog.Call) error {
		made, err := k.Register(ctx, call, catalog.Registration{Image: m, Token: o.token})
		if err != nil {
			return err
		}
		return a.ui.Result("registered", made.ID, recordFields(made))
	})
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
