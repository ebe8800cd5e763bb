package main

import (
	"strings"

	"github.com/spf13/cobra"
)

// branch makes a command that does nothing but hold others.
func branch(name, short, long, example string) *cobra.Command {
	return &cobra.Command{
		Use: name, Short: short, Long: strings.TrimSpace(long), Example: strings.Trim(example, "\n"),
		Args: knownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
}

// knownCommand refuses arguments: what is no command below cmd is none at all.
func knownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usagef("unknown command %q", strings.TrimPrefix(cmd.CommandPath()+" "+args[0], cmd.Root().Name()+" "))
}

// nothingElse refuses arguments in words of its own, which show the first.
func nothingElse(format string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		return usagef(format, args[0])
	}
}
