//go:build !race

package rpcjson

const raceEnabled = false
