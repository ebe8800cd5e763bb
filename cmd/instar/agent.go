package main

import (
	"strings"

	"github.com/spf13/cobra"
)

// newAgent makes the commands of the agent on the host.
func newAgent(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "agent", Short: "capture this machine from a service, by schedule, and make it its instance's own",
		Long: strings.TrimSpace(`
The agent on the host: captures that are asked for over a socket or by schedule,
and what a machine does when it starts. docs/agent.md`),
		Example: `  instar agent boot status`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("unknown command %q", "agent "+args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newAgentBoot(a))
	return cmd
}
