package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/cmd/instar/internal/config"
	"github.com/instar-image/instar/cmd/instar/internal/manual"
	"github.com/instar-image/instar/cmd/instar/internal/optdoc"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

// The commands about Instar itself.

func newVersion(a *app) *cobra.Command {
	return a.command("version", "show the version", `
Shows the version, the platform and the Go release it was built with. As
ec2-ami-tools-version and euca-version it begins with the version of the peer
whose behaviour it has.`, "  instar version", func(context.Context) error {
		return a.ui.Result("version", versionLine(a.family), ui.Fields{"version": version})
	})
}

// peerNames are the links that make Instar the peers' tools.
func peerNames() []string {
	return []string{
		"ec2-bundle-image", "ec2-bundle-vol", "ec2-unbundle", "ec2-upload-bundle", "ec2-download-bundle", "ec2-delete-bundle",
		"ec2-migrate-manifest", "ec2-migrate-bundle", "ec2-ami-tools-version",
		"euca-bundle-image", "euca-bundle-vol", "euca-unbundle", "euca-upload-bundle", "euca-download-bundle", "euca-delete-bundle",
		"euca-bundle-and-upload-image", "euca-download-and-unbundle", "euca-unbundle-stream", "euca-version",
		"euca-install-image", "euca-bundle-instance", "euca-describe-bundle-tasks", "euca-cancel-bundle-task",
		"euimage-pack-image", "euimage-describe-pack", "euimage-install-pack",
	}
}

func newLinks(a *app) *cobra.Command {
	var force bool
	cmd := a.command("links DIR", "make the peers' names links to this program", `
Makes symbolic links in DIR, one for each command of ec2-ami-tools and
euca2ools, to this program. Packer's amazon-instance builder and old scripts
then work unchanged: DIR must be in the PATH of root's login shell. A file of
another origin is not replaced unless --force is given.`,
		"  instar links /usr/local/bin", nil)
	cmd.Args = cobra.MatchAll(func(_ *cobra.Command, args []string) error {
		if len(args) != 1 && !a.manual && !a.showVersion {
			return usagef("links takes one directory")
		}
		return nil
	})
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if err := isDir(args[0], "the directory for the links"); err != nil {
			return err
		}
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("finding this program: %w", err)
		}
		for _, n := range peerNames() {
			path := filepath.Join(args[0], n)
			if old, err := os.Readlink(path); err == nil && old == self {
				continue
			}
			if force {
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("replacing %s: %w", path, err)
				}
			}
			if err := os.Symlink(self, path); err != nil {
				return withHint(failf(exitFile, "making a link: %w", err), "--force replaces it.")
			}
			if err := a.ui.Result("link", path, ui.Fields{"path": path, "target": self}); err != nil {
				return err
			}
		}
		return nil
	}
	flagsOf(cmd).yes(&force, "force", "", "replace what stands there", ofUs, "links")
	return cmd
}

func newConfig(a *app) *cobra.Command {
	var long strings.Builder
	long.WriteString(`
Shows every setting that somebody made, its value and where it came from. The
first of these that says anything wins: the command's option, the environment,
~/.config/instar/config.yaml (or --config FILE, or $INSTAR_CONFIG),
/etc/instar/config.yaml ($INSTAR_ETC/config.yaml), the files of euca2ools
($EUCA_CONFIG_PATH, ~/.euca/*.ini, /etc/euca2ools), the default. Secrets are
not shown. config.yaml holds lines "name: value"; a name it does not know is an
error. The settings:

`)
	for _, k := range config.Keys() {
		fmt.Fprintf(&long, "  %-16s %s\n", k.Name, k.What)
	}
	return a.command("config", "show the settings and where they come from", long.String(),
		"  instar config\n  INSTAR_CONFIG=./test.yaml instar config --json", func(context.Context) error {
			for _, k := range config.Keys() {
				v := a.conf.Get(k.Name)
				if v.From == "" {
					continue
				}
				if k.Secret {
					v.Text = "(set)"
				}
				err := a.ui.Result("setting", fmt.Sprintf("%-16s %-40s %s", k.Name, v.Text, v.From), ui.Fields{"name": k.Name, "value": v.Text, "from": v.From})
				if err != nil {
					return err
				}
			}
			return nil
		})
}

func newMan(a *app) *cobra.Command {
	cmd := a.command("man DIR", "write manual pages and shell completions", `
Writes a manual page for every command into DIR/man1 and completions for bash,
zsh and fish into DIR/completion. For whoever packages Instar.`, "  instar man ./man", nil)
	cmd.Hidden = true
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usagef("man takes one directory")
		}
		return writeManuals(cmd.Root(), args[0])
	}
	return cmd
}

// writeManuals fills dir with what a package installs.
func writeManuals(root *cobra.Command, dir string) error {
	man, comp := filepath.Join(dir, "man1"), filepath.Join(dir, "completion")
	for _, d := range []string{man, comp} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("making a directory for manuals: %w", err)
		}
	}
	for _, c := range append([]*cobra.Command{root}, root.Commands()...) {
		if c.Hidden {
			continue
		}
		p := manualOf(c)
		if err := os.WriteFile(filepath.Join(man, p.Name+".1"), p.Roff(), 0o644); err != nil {
			return fmt.Errorf("writing a manual page: %w", err)
		}
	}
	for name, gen := range map[string]func(io.Writer) error{
		"instar.bash": func(w io.Writer) error { return root.GenBashCompletionV2(w, true) },
		"_instar":     root.GenZshCompletion,
		"instar.fish": func(w io.Writer) error { return root.GenFishCompletion(w, true) },
	} {
		var b strings.Builder
		if err := gen(&b); err != nil {
			return fmt.Errorf("making completions: %w", err)
		}
		if err := os.WriteFile(filepath.Join(comp, name), []byte(b.String()), 0o644); err != nil {
			return fmt.Errorf("writing completions: %w", err)
		}
	}
	return nil
}

func newOptionsTable(a *app) *cobra.Command {
	cmd := a.command("options-table", "write docs/options.md", `
Writes the table of the peers' options to standard output.`, "", nil)
	cmd.Hidden = true
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return optdoc.Write(a.stdout, optionRows(cmd.Root()))
	}
	return cmd
}

func showManual(w io.Writer, cmd *cobra.Command) error {
	_, err := io.WriteString(w, manualOf(cmd).Text())
	return err
}

// manualOf gathers a command's manual page.
func manualOf(cmd *cobra.Command) manual.Page {
	p := manual.Page{
		Name: strings.ReplaceAll(cmd.CommandPath(), " ", "-"), Usage: cmd.CommandPath(), Short: cmd.Short, Long: cmd.Long, Example: cmd.Example,
		Options: cmd.LocalFlags(), Common: cmd.InheritedFlags(), Version: version,
	}
	if cmd.HasParent() {
		p.Usage += strings.TrimPrefix(cmd.Use, cmd.Name())
		if cmd.Name() != "completion" {
			p.Usage += " [OPTION]..."
		}
	} else {
		p.Usage += " COMMAND [OPTION]..."
		for _, c := range cmd.Commands() {
			if !c.Hidden {
				p.Commands = append(p.Commands, manual.Item{Term: c.Name(), Text: c.Short})
			}
		}
	}
	for _, e := range exitTable() {
		p.Exits = append(p.Exits, manual.Item{Term: fmt.Sprint(e.code), Text: e.what})
	}
	for _, k := range config.Keys() {
		for _, n := range k.Env {
			p.Environment = append(p.Environment, manual.Item{Term: n, Text: k.What})
		}
	}
	p.Environment = append(p.Environment, otherEnvironment()...)
	p.Files = []manual.Item{
		{Term: "~/.config/instar/config.yaml", Text: "the user's settings; \"instar config\" shows them"},
		{Term: "/etc/instar/config.yaml", Text: "the machine's settings"},
		{Term: "/etc/instar/ec2-cert.pem", Text: "the cloud's certificate, when nothing else names one"},
		{Term: "~/.euca/*.ini, /etc/euca2ools/euca2ools.ini, /etc/euca2ools/conf.d/*.ini", Text: "euca2ools' settings, read last"},
	}
	return p
}

// otherEnvironment are the variables that are no settings of config.yaml.
func otherEnvironment() []manual.Item {
	return []manual.Item{
		{Term: "INSTAR_CONFIG", Text: "file to read instead of ~/.config/instar/config.yaml"},
		{Term: "INSTAR_ETC", Text: "directory to read instead of /etc/instar"},
		{Term: "AWS_CREDENTIAL_FILE", Text: "file with lines AWSAccessKeyId=... and AWSSecretKey=..."},
		{Term: "AWS_CREDENTIAL_EXPIRATION", Text: "when the credentials of the environment expire; expired ones are refused before work begins"},
		{Term: "AWS_PROFILE, AWS_SHARED_CREDENTIALS_FILE, AWS_CONFIG_FILE", Text: "as in the AWS tools, when no keys are given otherwise"},
		{Term: "AWS_EC2_METADATA_SERVICE_ENDPOINT, AWS_EC2_METADATA_DISABLED", Text: "where the instance's metadata is, for --inherit and credentials; \"true\" turns it off"},
		{Term: "EC2_AMITOOL_HOME, EC2_HOME", Text: "where ec2-ami-tools are installed: their etc/ec2/amitools/cert-ec2.pem is used when nothing else names the cloud's certificate"},
		{Term: "EUCA_CONFIG_PATH", Text: "file or directory with euca2ools' settings"},
		{Term: "EC2_URL, EUCA_BOOTSTRAP_URL, AMITOOLS_EC2_REGION_ENDPOINT", Text: "without effect: Instar does not talk to an EC2 service"},
		{Term: "HTTPS_PROXY, HTTP_PROXY, NO_PROXY", Text: "proxies"},
		{Term: "TMPDIR, TEMP, TMP", Text: "where scratch files and, as euca-bundle-image, new bundles go; default /var/tmp"},
		{Term: "NO_COLOR", Text: "no colour"},
		{Term: "JOURNAL_STREAM", Text: "set by systemd: messages become entries of the journal with fields"},
	}
}
