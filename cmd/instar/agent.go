package main

import (
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/server"
)

// The commands of the agent.

func newAgent(a *app) *cobra.Command {
	cmd := branch("agent", "capture this machine by schedule or on request, as a service", `
The agent takes captures on request, runs one after the other at low priority,
remembers them over restarts, and is watched from outside. "instar agent
install" makes it a systemd service; "instar agent ctl" talks to it. The
machine is its instance's own from the first boot on with "instar agent boot".
docs/agent.md describes it.`, `
  instar agent install
  instar agent ctl start create-image --store s3://images/fleet --name web-1
  instar agent ctl list
  instar agent boot status`)
	cmd.AddCommand(newAgentRun(a), newAgentCtl(a), newAgentInstall(a), newAgentUninstall(a), newAgentBoot(a), newAgentSchedule(a), newAgentNotices(a),
		newAgentWork(a), newAgentGuard(a), newAgentHooks(a), newAgentOrders(a))
	return cmd
}

// agentState is where an agent keeps its tasks.
const agentState = "/var/lib/instar/agent"

// agentRuntime is where things are that do not outlive the system.
const agentRuntime = "/run/instar"

// agentPlaces are the options that say where an agent is.
type agentPlaces struct{ socket, state string }

func newAgentPlaces() agentPlaces {
	return agentPlaces{socket: server.DefaultSocket, state: agentState}
}

func (o *agentPlaces) tasks() string { return filepath.Join(o.state, "tasks") }
