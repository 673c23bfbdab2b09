//go:build race

package ota_test

const raceEnabled = true
