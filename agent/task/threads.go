package task

import (
	"os"
	"strconv"
)

// threads lists this process's threads.
func threads() ([]int, error) {
	names, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	var tids []int
	for _, n := range names {
		tid, err := strconv.Atoi(n.Name())
		if err != nil {
			return nil, err
		}
		tids = append(tids, tid)
	}
	return tids, nil
}
