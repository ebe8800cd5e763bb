package main

import (
	"github.com/spf13/cobra"
)

// refusal is a command of the peers that Instar refuses by name.
type refusal struct {
	name    string
	why     string   // the reason, and what to do instead
	options []string // refused together with it, for docs/options.md
}

func refusals() []refusal {
	const tasks = "bundle tasks run inside the cloud's hypervisor for Windows instances and Amazon has withdrawn them; " +
		"run 'instar bundle-vol -b BUCKET/PREFIX' inside the machine"
	const packs = "the .euimage format was a technology preview of Eucalyptus; " +
		"move an image as a bundle: 'instar bundle-and-upload-image' and 'instar download-and-unbundle'"
	service := []string{"-h --help", "--region", "--debug", "--debugger", "--version", "-U --url", "-I --access-key-id", "-S --secret-key", "--security-token"}
	return []refusal{
		{
			"install-image",
			"it registers with a cloud's EC2 service, which Instar does not speak to; use 'instar bundle-and-upload-image', then " +
				"'aws ec2 register-image --image-location BUCKET/PREFIX/NAME.manifest.xml'",
			append([]string{
				"-n --name", "--description", "--virtualization-type", "--platform", "--ec2-url", "-i --image", "-p --prefix", "-d --destination",
				"-r --arch", "-k --privatekey", "-c --cert", "--ec2cert", "-u --user", "--kernel", "--ramdisk", "-B --block-device-mappings", "--productcodes", "--image-size",
				"--bootstrap-url", "--image-type", "--part-size", "--enc-key", "--enc-iv", "--batch", "-b --bucket", "--acl", "--upload-policy",
				"--upload-policy-file", "--upload-policy-signature", "--location", "--retry", "--preserve-bundle", "--max-pending-parts",
			}, service...),
		},
		{
			"bundle-instance", tasks,
			append([]string{
				"-b --bucket", "-p --prefix", "-o --owner-akid --user-access-key", "-c --policy", "-s --policy-signature",
				"-w --owner-sak --user-secret-key", "-x --expires", "--show-empty-fields",
			}, service...),
		},
		{"describe-bundle-tasks", tasks, append([]string{"--filter", "--show-empty-fields"}, service...)},
		{"cancel-bundle-task", tasks, append([]string{"--show-empty-fields"}, service...)},
		{"euimage-pack-image", packs, []string{"-h --help", "--debug", "--debugger", "--version"}},
		{"euimage-describe-pack", packs, []string{"-h --help", "--debug", "--debugger", "--version"}},
		{
			"euimage-install-pack", packs,
			append([]string{"--profile", "--privatekey", "--cert", "--ec2cert", "--user", "-b --bucket", "--location", "--kernel", "--ramdisk", "--ec2-url"}, service...),
		},
	}
}

func refusedCommands(*app) []*cobra.Command {
	var cmds []*cobra.Command
	for _, r := range refusals() {
		cmds = append(cmds, &cobra.Command{
			Use: r.name, Short: "refused: " + r.why, Hidden: true, DisableFlagParsing: true,
			Annotations: map[string]string{noteRefused: r.why},
			RunE: func(*cobra.Command, []string) error {
				return &exitError{code: exitUsage, err: &refusedError{r.name, r.why}, hint: "docs/options.md lists what works and what is refused."}
			},
		})
	}
	return cmds
}

// refusedError says that a command is known and refused.
type refusedError struct{ name, why string }

func (e *refusedError) Error() string { return e.name + " is " + errRefused.Error() + ": " + e.why }
func (e *refusedError) Unwrap() error { return errRefused }
