package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-image/instar/cmd/instar/internal/config"
)

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPrecedence takes away one source after the other: each time the next
// one's word counts.
func TestPrecedence(t *testing.T) {
	home, etc := t.TempDir(), filepath.Join(t.TempDir(), "instar")
	user := write(t, filepath.Join(home, ".config/instar/config.yaml"), "region: user\n")
	machine := write(t, filepath.Join(etc, "config.yaml"), "region: machine\n")
	write(t, filepath.Join(home, ".euca/a.ini"), "[global]\ndefault-region = euca\n")
	env := map[string]string{"AWS_REGION": "env1", "AWS_DEFAULT_REGION": "env2", "EUCA_DEFAULT_REGION": "bob@env3"}
	load := func(euca bool) *config.Config {
		t.Helper()
		c, err := config.Load(config.Sources{Getenv: func(k string) string { return env[k] }, Home: home, Etc: etc, Euca: euca})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	check := func(want, from string) {
		t.Helper()
		if v := load(false).Get("region"); v.Text != want || !strings.HasPrefix(v.From, from) {
			t.Errorf("region is %q from %q, want %q from %q", v.Text, v.From, want, from)
		}
	}
	c := load(false)
	c.Set("region", "option", "--region")
	if c.Get("region").Text != "option" {
		t.Error("the option does not win")
	}
	if v := load(true).Get("region"); v.Text != "env3" {
		t.Errorf("as euca-*: %q, want euca2ools' variable without the user", v.Text)
	}
	check("env1", "$AWS_REGION")
	delete(env, "AWS_REGION")
	check("env2", "$AWS_DEFAULT_REGION")
	delete(env, "AWS_DEFAULT_REGION")
	check("env3", "$EUCA_DEFAULT_REGION")
	delete(env, "EUCA_DEFAULT_REGION")
	check("user", user+":1")
	os.Remove(user)
	check("machine", machine+":1")
	os.Remove(machine)
	check("euca", home)
	os.RemoveAll(filepath.Join(home, ".euca"))
	check("", "")
}

// TestKeysComeInPairs: the certificate and key of two families are never mixed.
func TestKeysComeInPairs(t *testing.T) {
	env := map[string]string{"EC2_CERT": "ec2", "EC2_PRIVATE_KEY": "ec2", "EUCA_CERT": "euca", "EUCA_PRIVATE_KEY": "euca"}
	for _, euca := range []bool{false, true} {
		c, err := config.Load(config.Sources{Getenv: func(k string) string { return env[k] }, Euca: euca})
		if err != nil {
			t.Fatal(err)
		}
		want := map[bool]string{false: "ec2", true: "euca"}[euca]
		if c.Get("certificate").Text != want || c.Get("private_key").Text != want {
			t.Errorf("as euca-* %t: certificate %q, key %q; want both of %s", euca, c.Get("certificate").Text, c.Get("private_key").Text, want)
		}
	}
}

func TestYAMLRefused(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]string{
		"a: b":                   ":1: unknown setting \"a\"",
		"region: a\n\nx: y\n":    ":3: unknown setting",
		"region: [a]":            ":1: region takes one plain value",
		"region:":                ":1: region takes one plain value",
		"- a":                    ":1: expected lines",
		"region: a\nregion: b\n": ":2: ",
		"secret_key: x":          ":1: secret_key does not belong",
		"region: \"a":            "c.yaml",
	} {
		path := write(t, filepath.Join(dir, "c.yaml"), text)
		_, err := config.Load(config.Sources{User: path})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q gives %v, want %q", text, err, want)
		}
	}
	for _, text := range []string{"", "# nothing\n", "account_id: 000011112222\n", "store: a/b # c\n"} {
		c, err := config.Load(config.Sources{User: write(t, filepath.Join(dir, "c.yaml"), text)})
		if err != nil {
			t.Errorf("%q gives %v", text, err)
			continue
		}
		if v := c.Get("account_id").Text; strings.HasPrefix(text, "account_id") && v != "000011112222" {
			t.Errorf("an account number with leading zeros became %q", v)
		}
	}
}

// FuzzFiles: whatever the files hold, Load answers or says where it is wrong.
func FuzzFiles(f *testing.F) {
	f.Add("region: a\n", "[global]\ndefault-region = b@c\n[region c]\ns3-url=x\n")
	f.Add("a: *b", "[")
	f.Add("? {}\n: x", "x = y")
	f.Add("a: &a [*a]", "[user *]\nkey-id : z")
	f.Fuzz(func(t *testing.T, yaml, ini string) {
		dir := t.TempDir()
		y, i := write(t, filepath.Join(dir, "c.yaml"), yaml), write(t, filepath.Join(dir, "e.ini"), ini)
		c, err := config.Load(config.Sources{User: y, Getenv: func(k string) string {
			if k == "EUCA_CONFIG_PATH" {
				return i
			}
			return ""
		}})
		if err != nil {
			if !strings.Contains(err.Error(), dir) {
				t.Errorf("the error does not say which file is wrong: %v", err)
			}
			return
		}
		for _, k := range config.Keys() {
			if v := c.Get(k.Name); v.Text != "" && v.From == "" {
				t.Errorf("%s is %q from nowhere", k.Name, v.Text)
			}
		}
	})
}
