# The settings of a recipe, recipes/PROGRAM/RECIPE.json, which the program reads by --config. Sourced by train.sh and
# eval.sh after launch.sh.

RECIPE=${RECIPE:-reg}

# Sets RECIPE_FILE to the file of a program, train or generate. The other arguments are the flags of the command line.
choose_recipe() {
    local program=$1 file name allowed=""
    shift
    RECIPE_FILE=""
    for file in "$REPOSITORY/recipes/$program"/*.json; do
        name=$(basename "$file" .json)
        allowed+=${allowed:+, }$name
        if [ "$name" = "$RECIPE" ]; then RECIPE_FILE=$file; fi
    done
    [ -n "$RECIPE_FILE" ] || fail "RECIPE $RECIPE: unknown; allowed: $allowed"
    if [ "$RECIPE" != reg ] && [[ " $*" == *" --config"* ]]; then
        fail "--config replaces the settings of RECIPE $RECIPE; give one of them"
    fi
}

# Prints a setting of the recipe, a number or a text.
recipe_setting() {
    sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$RECIPE_FILE"
}
