package main

import (
	"errors"
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newRoot builds the tree of commands.
func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "instar",
		Short: "capture a machine into an image on S3-compatible storage, and bring it back",
		Long: strings.TrimSpace(`
Instar captures a running machine's root filesystem, straight from the live
system to S3-compatible storage or a directory, reading each file once, without
a scratch disk, and leaving nothing half-made:

  as an image (create-image), of which only what changed is stored: encrypted,
  signed with an SSH key, restored or booted whole; docs/images.md

  as an EC2 bundle (bundle-vol), a signed manifest and encrypted parts that
  ec2-ami-tools and euca2ools open as well. Commands and options are theirs.
  Links to this program named ec2-bundle-vol, euca-bundle-vol and so on are those
  tools ("instar links DIR" makes them); docs/options.md lists every option`),
		Example: `  instar create-image --store s3://images/fleet --name web-1
  instar restore web-1 --store s3://images/fleet --to root.img
  instar bundle-vol -b images/web-1 -k key.pem -c cert.pem -u 111122223333 --ec2cert ec2.pem
  instar download-and-unbundle -b images/web-1 -m image.manifest.xml -k key.pem -d root.img`,
		SilenceErrors: true, SilenceUsage: true,
		Args: knownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if strings.HasPrefix(cmd.Name(), cobra.ShellCompRequestCmd) {
				return nil
			}
			return a.begin(cmd)
		},
	}
	p := flags{root.PersistentFlags()}
	p.SortFlags = false
	p.yes(&a.batch, "batch", "", "ask nothing: warnings count as answered with yes", ofBoth, "prompts")
	p.yes(&a.debug, "debug", "", "tell on standard error what is done and how long it takes", ofBoth, "common")
	p.yes(&a.manual, "manual", "", "show the manual page and exit", ofEC2, "common")
	p.yes(&a.showVersion, "version", "", "show the version and exit", ofBoth, "common")
	p.yes(&a.json, "json", "", "results and messages as JSON, one object a line with its message_type; implies --batch", ofUs, "json")
	p.yes(&a.quiet, "quiet", "", "results, warnings and errors only", ofUs, "common")
	p.text(&a.configFile, "config", "", "read `FILE` instead of ~/.config/instar/config.yaml", ofUs, "config")
	p.refuse("debugger", "", "it would start Python's debugger; use --debug", ofEuca, false)

	// By what one wants to do.
	group := func(title string, cmds ...*cobra.Command) {
		root.AddGroup(&cobra.Group{ID: title, Title: title})
		for _, cmd := range cmds {
			cmd.GroupID = title
		}
		root.AddCommand(cmds...)
	}
	group("Images, of which a store keeps only what changes:",
		newCreateImage(a), newRestore(a), newMount(a), newUmount(a), newNBD(a), newImages(a),
		newVerify(a), newRepair(a), newGC(a), newRecipients(a), newExport(a), newImport(a))
	group("EC2 bundles, with the names and options of the peers' tools:",
		newBundleVol(a), newBundleImage(a), newUploadBundle(a), newBundleAndUpload(a),
		newDownloadBundle(a), newUnbundle(a), newDownloadAndUnbundle(a), newUnbundleStream(a),
		newDeleteBundle(a), newMigrateManifest(a), newMigrateBundle(a), newLinks(a))
	group("Boot, with keys and user data inside:", newLaunch(a), newInitrd(a), newMetadata(a), newCache(a))
	group("On the machine, by schedule or on request:", newAgent(a))
	group("A catalog of images, for EC2's clients and for people:", newCatalog(a), newAccounts(a), newKeys(a))
	group("This program:", newConfig(a), newVersion(a))
	root.AddCommand(newMan(a), newOptionsTable(a))
	root.SetHelpCommandGroupID("This program:")
	root.SetCompletionCommandGroupID("This program:")
	root.AddCommand(refusedCommands(a)...)
	root.CompletionOptions.HiddenDefaultCmd = false
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return flagError(err)
	})
	return root
}

// flagError makes of pflag's errors a usage error, and of a refused option
// the reason it is refused.
func flagError(err error) error {
	if errors.Is(err, errRefused) {
		var invalid *pflag.InvalidValueError
		if errors.As(err, &invalid) {
			err = errors.Unwrap(invalid)
		}
		return &exitError{code: exitUsage, err: err, hint: "docs/options.md lists what works and what is refused."}
	}
	return usagef("%w", err)
}

// expand completes long options that are cut short, as optparse and argparse
// do: --dest is --destination when nothing else begins like that.
func expand(cmd *cobra.Command, args []string) []string {
	var names []string
	exact := map[string]bool{"help": true}
	collect := func(f *pflag.Flag) {
		if exact[f.Name] {
			return
		}
		exact[f.Name] = true
		if !f.Hidden || f.Annotations[noteRefused] != nil {
			names = append(names, f.Name)
		}
	}
	cmd.Flags().VisitAll(collect)
	cmd.InheritedFlags().VisitAll(collect)
	out := make([]string, 0, len(args))
	for i, arg := range args {
		if arg == "--" {
			return append(out, args[i:]...)
		}
		name, value, has := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		if strings.HasPrefix(arg, "--") && len(name) > 1 && !exact[name] {
			found := ""
			for _, n := range names {
				switch {
				case !strings.HasPrefix(n, name):
				case found == "":
					found = n
				default:
					found = "-"
				}
			}
			if found != "" && found != "-" {
				arg = "--" + found
				if has {
					arg += "=" + value
				}
			}
		}
		out = append(out, arg)
	}
	return out
}

// dispatch finds the command and family a link's name stands for.
func dispatch(root *cobra.Command, tool string) (string, family) {
	for prefix, fam := range map[string]family{"ec2-": familyEC2, "euca-": familyEuca, "euimage-": familyEuca} {
		rest, ok := strings.CutPrefix(tool, prefix)
		if !ok {
			continue
		}
		switch {
		case tool == "ec2-ami-tools-version":
			return "version", fam
		case prefix == "euimage-":
			return tool, fam
		}
		return rest, fam // which may be a tool that Instar has never heard of
	}
	return "", familyInstar
}

func versionLine(f family) string {
	own := fmt.Sprintf("instar %s (%s/%s, %s)", version, runtime.GOOS, runtime.GOARCH, runtime.Version())
	switch f {
	case familyEC2:
		return "1.5.3 20071010 as spoken by " + own
	case familyEuca:
		return "euca2ools 3.4.1 as spoken by " + own
	default:
		return own
	}
}
